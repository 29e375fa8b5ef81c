"""From an image file to what a vision trunk reads: decoded here, resized and cropped as the model's preprocessor_config.json says.

Pixels stay bytes (3, H, W). The trunk itself makes numbers of them (`Processor.feed`), where it computes and in its own precision: batches
take a quarter of the room, and no caller needs to know means and deviations.
"""

from __future__ import annotations

import base64
import binascii
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

Pixels = NDArray[np.uint8]

LARGEST = 2**26
"""Most pixels of an image (8192 x 8192): a file of a few kB may ask for any number."""
FORMATS = ("PNG", "JPEG")
URL = "data:image/"
"""How a text begins that holds an image itself (RFC 2397)."""
STARTS = {"iVBORw0KGgo": "png", "/9j/": "jpeg"}
"""How the base64 of each format begins."""
FAULTS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error, zlib.error)
"""What Pillow raises for files that are torn or made up."""
WAYS = "give the path of a PNG or JPEG file, or the image itself as data:image/png;base64,..."


class File(str):
    """The path of an image file of this machine, as its own rows and commands name it; a text that somebody sent is none."""


@dataclass(frozen=True, eq=False)
class Processor:
    """How one model's images are made: ``inner`` is transformers' image processor, in the form that computes with Pillow.

    Images come out (H, W) = ``size``; ``scale`` and ``shift`` (3,) make the trunk's numbers of pixels. Of an image the trunk makes
    ``tokens`` states of ``width`` values.
    """

    inner: Any
    size: tuple[int, int]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    tokens: int
    width: int

    def pixels(self, source: str | bytes) -> Pixels:
        """The pixels (3, H, W) of a `File`, of a text that holds an image, or of a file's bytes. Raises `DataError` naming it."""
        return resized(self.inner, picture(source))

    def stack(self, sources: Sequence[str | bytes]) -> Tensor:
        """Pixels (N, 3, H, W) of several."""
        import torch

        return torch.from_numpy(np.stack([self.pixels(source) for source in sources]))

    def values(self, pixels: Tensor, dtype: Any) -> Tensor:
        """What the trunk computes with, (N, 3, H, W) of ``dtype``: pixels times scale plus shift, in float32."""
        import torch

        scale, shift = (torch.tensor(part, device=pixels.device).view(3, 1, 1) for part in (self.scale, self.shift))
        return (pixels.float() * scale + shift).to(dtype)

    def feed(self, trunk: nn.Module) -> None:
        """From now on ``trunk`` takes pixels, and makes numbers of them; numbers that it is given are left as they are."""
        trunk.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, trunk: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = next(p.dtype for p in trunk.parameters() if p.is_floating_point())
        read = [self._read(value, dtype) for value in args]
        return tuple(read), {name: self._read(value, dtype) for name, value in named.items()}

    def _read(self, value: Any, dtype: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor) or value.dim() != 4:
            return value
        return self.values(value, dtype) if value.dtype == torch.uint8 else value.to(dtype)


def picture(source: str | bytes) -> Any:
    """The image of ``source`` as Pillow's, in RGB and the right way up.

    Raises:
        DataError: there is none, it is no PNG or JPEG, torn, or larger than `LARGEST` pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    stream, name = _opened(source)
    try:
        with stream, Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise _large(name, f"{image.width} x {image.height}")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _large(name, "far more") from None
    except FAULTS as fault:
        why = f"its image is broken: {_first(fault)}" if not isinstance(fault, UnidentifiedImageError) else "it is no PNG or JPEG"
        raise DataError(f"{name}: {why}; {WAYS}") from None


def resized(inner: Any, image: Any) -> Pixels:
    """What ``inner`` resizes and crops ``image`` to, (C, H, W), before it makes numbers of it."""
    made = inner(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(made[0])


def text_of(source: str | bytes) -> str:
    """``source`` as a text that `Processor.pixels` reads again; bytes are written out, a path stays one."""
    if isinstance(source, bytes):
        coded = base64.b64encode(source).decode()
        return f"{URL}{next((kind for start, kind in STARTS.items() if coded.startswith(start)), 'png')};base64,{coded}"
    return source


def asked(text: str) -> str:
    """A text of this machine's command line: the path of a file is one."""
    return File(text) if os.path.isfile(text) else text


def sent(text: str) -> str:
    """``text`` as it can leave this machine: an image file by what it holds. Raises `DataError` when it is no image."""
    if not isinstance(text, File) or not text.lower().endswith((".png", ".jpg", ".jpeg")):
        return text
    picture(text)
    return text_of(Path(text).read_bytes())


def held(text: str) -> bool:
    """Whether ``text`` holds an image itself."""
    return text.startswith((URL, *STARTS))


def _opened(source: str | bytes) -> tuple[Any, str]:
    """A stream of the file's bytes, and what messages call it."""
    if isinstance(source, bytes):
        return BytesIO(source), f"an image of {len(source)} bytes"
    if held(source):
        head, _, body = source.rpartition(",")
        try:
            return BytesIO(base64.b64decode(body, validate=True)), "an image in base64"
        except (binascii.Error, ValueError):
            raise DataError(f"an image in base64 ({(head or body)[:32]}...): not base64; {WAYS}") from None
    if not isinstance(source, File):
        raise DataError(
            f"{source[:48]!r}: holds no image, and this base reads images; it must be data:image/png;base64,... (no link is followed), or "
            "for a command of this machine the path of a file that is there"
        )
    try:
        return open(source, "rb"), source
    except OSError as fault:
        raise DataError(f"{source}: cannot be read: {fault.strerror or fault}; {WAYS}") from None


def _rgb(image: Any) -> Any:
    """8 bits a channel: of 16 the upper ones (Pillow would cut brightness off), transparency left out."""
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _large(name: str, size: str) -> DataError:
    return DataError(f"{name}: {size} pixels; at most {LARGEST:,} are read, cut it into tiles or make it smaller")


def _first(fault: BaseException) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0][:120]
