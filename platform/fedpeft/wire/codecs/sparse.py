"""Top-k: the largest magnitudes and where they are (Stich et al. 2018, arXiv 1809.07599; with memory).

Places travel as gaps from one to the next, a byte each (255: go on adding), in Huffman codes; values as int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import UpdateError
from fedpeft.wire.codecs import entropy, frames, integers, rounding

Flat = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MORE = 255
LIMIT, BLOCK = 127, 64


@dataclass(frozen=True)
class TopK:
    """The ``fraction`` of values of largest magnitude; biased, so a residual must be kept."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.02

    kind: ClassVar[str] = "topk"
    masked: ClassVar[bool] = False

    def kept(self, size: int) -> int:
        """How many of ``size`` values travel: at least one."""
        return min(max(round(self.fraction * size), 1), size)

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        kept = self.kept(size)
        return 3 * frames.LENGTH.size + 1 + kept + size // MORE + integers.most(kept, LIMIT, BLOCK)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        magnitudes = np.abs(rounding.rows_of(flat, max(flat.size, 1)).reshape(-1))
        kept = self.kept(flat.size)
        places = np.sort(np.argpartition(magnitudes, flat.size - kept)[flat.size - kept :]) if kept else np.zeros(0, np.int64)
        gaps = _gaps(places)
        head = frames.LENGTH.pack(gaps.size)
        return frames.join(head + entropy.squeeze(gaps), integers.encode(flat[places], LIMIT, BLOCK, seed))

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        head, body = frames.split(data, 2)
        kept, flat = self.kept(size), np.zeros(size, np.float32)
        places = _places(head, kept, size)
        flat[places] = integers.decode(body, kept, LIMIT, BLOCK)
        return flat


def _gaps(places: NDArray[np.int64]) -> Bytes:
    """Ascending places as bytes: what lies between one and the next, in units of 255 and a rest."""
    between = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(between // MORE + 1)
    out = np.full(int(ends[-1]) if ends.size else 0, MORE, np.uint8)
    out[ends - 1] = between % MORE
    return out


def _places(head: memoryview, kept: int, size: int) -> NDArray[np.int64]:
    """Inverse of `_gaps`, of a count and squeezed bytes. Raises `UpdateError` unless it gives ``kept`` places below ``size``."""
    count = frames.LENGTH.unpack_from(head)[0] if len(head) >= frames.LENGTH.size else -1
    if not kept <= count <= kept + size // MORE:
        raise UpdateError(f"codec: {count} gaps cannot name {kept} of {size} places; do both sides run one version?")
    gaps = entropy.expand(head[frames.LENGTH.size :], count)
    moved = np.cumsum(np.where(gaps == MORE, MORE, gaps.astype(np.int64) + 1)) - 1
    places: NDArray[np.int64] = moved[gaps != MORE]
    if places.size != kept or (count and (gaps[-1] == MORE or moved[-1] >= size)):
        raise UpdateError(f"codec: {places.size} places up to {moved[-1] if count else -1}, {kept} below {size} were expected")
    return places
