"""int8, int4, int3 and int2: integers of each block's own scale, several to a byte, in Huffman codes.

Blockwise scales as in Dettmers et al. 2021 (arXiv 2110.02861), stochastic rounding as in QSGD (Alistarh et al. 2017, arXiv
1610.02132) with an entropy code in place of their Elias code. int2 is ternary, as in TernGrad (Wen et al. 2017, arXiv 1705.07878).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.wire.codecs import digits, entropy, frames, rounding, scales

Flat = NDArray[np.float32]
Block = Annotated[int, Field(ge=8, le=65536)]


@dataclass(frozen=True)
class Int8:
    """255 levels: at most half of 1/127 of its block's largest value off when rounded to nearest."""

    block: Block = 256

    kind: ClassVar[str] = "int8"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return most(size, 127, self.block)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        return encode(flat, 127, self.block, seed)

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        return decode(data, size, 127, self.block)


@dataclass(frozen=True)
class Int4:
    """15 levels."""

    block: Block = 256

    kind: ClassVar[str] = "int4"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return most(size, 7, self.block)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        return encode(flat, 7, self.block, seed)

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        return decode(data, size, 7, self.block)


@dataclass(frozen=True)
class Int3:
    """Seven levels: with a residual kept, the fewest that lost nothing measurable in a round."""

    block: Block = 64

    kind: ClassVar[str] = "int3"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return most(size, 3, self.block)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        return encode(flat, 3, self.block, seed)

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        return decode(data, size, 3, self.block)


@dataclass(frozen=True)
class Int2:
    """Three levels: nothing, or the block's largest magnitude with a sign. Keep a residual: without one it is mostly noise."""

    block: Block = 64

    kind: ClassVar[str] = "int2"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return most(size, 1, self.block)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        return encode(flat, 1, self.block, seed)

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        return decode(data, size, 1, self.block)


def encode(flat: Flat, limit: int, block: int, seed: int | None) -> bytes:
    """``flat`` (size,) as integers in [-limit, limit] times each block's step, which is its largest magnitude over ``limit``."""
    rows = rounding.rows_of(flat, block)
    head, peaks = scales.pack(np.abs(rows).max(axis=1))
    with np.errstate(over="ignore"):
        rows *= _inverse(peaks, limit)[:, None]
    codes = np.clip(rounding.whole(rows, seed), -limit, limit, out=rows).reshape(-1)[: flat.size]
    codes += np.float32(limit)
    return frames.join(head, entropy.squeeze(digits.pack(codes.astype(np.uint8), 2 * limit + 1)))


def decode(data: bytes | memoryview, size: int, limit: int, block: int) -> Flat:
    """Inverse of `encode`. Raises `UpdateError` when ``data`` is not such a message of ``size`` values."""
    head, body = frames.split(data, 2)
    blocks, base = -(-size // block), 2 * limit + 1
    steps = scales.unpack(head, blocks) / np.float32(limit)
    packed = entropy.expand(body, -(-size // digits.per_byte(base)))
    rows = np.zeros((blocks, block), np.float32)
    rows.reshape(-1)[:size] = digits.unpack(packed, base, size)
    rows -= np.float32(limit)
    rows *= steps[:, None]
    return rows.reshape(-1)[:size]


def most(size: int, limit: int, block: int) -> int:
    """The most bytes of a message."""
    packed = -(-size // digits.per_byte(2 * limit + 1))
    return 2 * frames.LENGTH.size + scales.most(-(-size // block)) + 1 + packed


def _inverse(peaks: Flat, limit: int) -> Flat:
    """One over the steps; 0 where a block is zero or too small for float32 to divide by."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(limit) / peaks
    return np.where(np.isfinite(inverse), inverse, np.float32(0.0))
