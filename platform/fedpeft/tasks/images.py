"""Rows of images: where an image lies, and its pixels, decoded when they are asked for and kept while there is room."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from fedpeft.bases.images import File, held, text_of
from fedpeft.errors import DataError
from fedpeft.tasks.protocol import Row

if TYPE_CHECKING:
    from fedpeft.bases.images import Processor

IMAGE = "image"
"""The column that holds an image, as hub data sets call it."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
KEPT = 2**29
"""Bytes of pixels that one set of examples keeps; what is beyond is decoded again whenever it is read."""
FORMS = "a path, data:image/png;base64,... or {bytes, path}"

Pixels = NDArray[np.uint8]


@dataclass(eq=False)
class Kept:
    """Pixels by the image's number, ``room`` bytes at most: every epoch reads every image once, so the first are as good as any."""

    room: int = KEPT
    found: dict[int, Pixels] = field(default_factory=dict)

    def keep(self, number: int, pixels: Pixels) -> None:
        """Keep ``pixels`` if there is room."""
        if pixels.nbytes <= self.room and number not in self.found:
            self.found[number] = pixels
            self.room -= pixels.nbytes


@dataclass(frozen=True, eq=False)
class Images(Sequence[Pixels]):
    """The pixels (3, H, W) of images; ``numbers`` says which of ``sources`` they are."""

    processor: Processor
    sources: Sequence[str | bytes]
    numbers: Sequence[int]
    kept: Kept

    @staticmethod
    def of(processor: Processor, sources: Sequence[str | bytes]) -> Images:
        """All of ``sources``, each read once, so that a broken one is found now. Raises `DataError` naming its row."""
        found = Images(processor, sources, range(len(sources)), Kept())
        for number in found.numbers:
            try:
                found[number]
            except DataError as fault:
                raise DataError(f"row {number + 1}: {fault}") from None
        return found

    def take(self, places: Iterable[int]) -> Images:
        """Some of them, kept together with these."""
        return Images(self.processor, self.sources, [self.numbers[place] for place in places], self.kept)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Pixels: ...
    @overload
    def __getitem__(self, place: slice) -> Images: ...
    def __getitem__(self, place: int | slice) -> Pixels | Images:
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        number = self.numbers[place]
        pixels = self.kept.found.get(number)
        if pixels is None:
            pixels = self.processor.pixels(self.sources[number])
            self.kept.keep(number, pixels)
        return pixels


def source_of(row: Row, number: int) -> str | bytes:
    """The image of row ``number`` (from 1): a `File`, a text that holds it, or a file's bytes. Raises `DataError` when it is none."""
    value = row.get(IMAGE)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"row {number}: field {IMAGE!r} is {_excerpt(row.get(IMAGE))}; give {FORMS}")
    return value


def written(value: Any) -> str:
    """``value`` in rows that are written as JSON, which has no form for it: an image's bytes as a text that holds them, else its text."""
    return text_of(value) if isinstance(value, bytes) else str(value)


def has_image(row: Row) -> bool:
    """Whether ``row`` is one of an image."""
    return row.get(IMAGE) is not None


def placed(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """``rows`` with the paths of their images under ``folder``, as a file of rows means them."""
    for row in rows:
        value = row.get(IMAGE)
        path = value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value
        yield {**row, IMAGE: File(folder / path)} if isinstance(path, str) and not held(path) and "://" not in path else row


def rows_of_folder(folder: Path, splits: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """A row for every image in ``folder``/LABEL, or ``folder``/SPLIT/LABEL where all its folders are called as ``splits`` are."""
    named = {name for names in splits.values() for name in names}
    inner = _folders(folder)
    if inner and all(path.name in named for path in inner):
        for part in inner:
            yield from ({**row, "split": part.name} for row in _labelled(part, folder))
    else:
        yield from _labelled(folder, folder)


def _labelled(folder: Path, root: Path) -> Iterator[Row]:
    for label in _folders(folder):
        for path in sorted(label.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
                yield {IMAGE: os.fspath(path.relative_to(root)), "label": label.name}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:47] + "…"
