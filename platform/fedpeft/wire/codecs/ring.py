"""Narrow rings: integers of public per-block scales, whose sums stay exact under masks and take few bits.

A value is the round's 32-bit code shifted right by its block's ``shift``, which the plan fixes for all sites from the last mean.
The sum of such integers, shifted back, is a sum of 32-bit codes of the same grid: what follows the sum need not know of it.
Only the low bits travel: masks added in the ring of 2^32 are masks in every narrower ring of a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import UpdateError
from fedpeft.update import WORD, Grid
from fedpeft.wire.codecs import rounding
from fedpeft.wire.codecs.base import Codec
from fedpeft.wire.codecs.integers import Block, Int2, Int3, Int4, Int8

Codes = NDArray[np.int32]
Flat = NDArray[np.float32]
Shifts = NDArray[np.uint8]

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


@dataclass(frozen=True)
class Plain:
    """The round's 32-bit codes as they are."""

    kind: ClassVar[str] = "none"
    masked: ClassVar[bool] = True

    def width(self, sites: int) -> int:
        """See `RingCodec`."""
        return WORD

    def most(self, size: int, sites: int) -> int:
        """See `Codec`."""
        return 4 * size


@dataclass(frozen=True)
class Ring:
    """``bits`` a value, sign included, and log2(sites) more for the sum.

    A block reaches ``headroom`` times the largest magnitude of its last mean; what is larger is cut there. Keep a residual.
    """

    bits: Annotated[int, Field(ge=2, le=16)] = 8
    block: Block = 256
    headroom: Annotated[float, Field(gt=0)] = 4.0

    kind: ClassVar[str] = "ring"
    masked: ClassVar[bool] = True

    @property
    def limit(self) -> int:
        """The largest integer that one site sends."""
        return int((1 << (self.bits - 1)) - 1)

    def width(self, sites: int) -> int:
        """See `RingCodec`."""
        return min(self.bits + ceil(log2(max(sites, 1))), WORD)

    def most(self, size: int, sites: int) -> int:
        """See `Codec`."""
        return packed_size(size, self.width(sites))

    def shifts(self, mean: Flat, grid: Grid) -> Shifts:
        """The plan's scales, uint8 (blocks,), from the last mean of weighted deltas (size,): what all sites must agree on.

        Blocks below the mean's root mean square get that of all, since the next delta may move what the last did not.
        """
        rows = rounding.rows_of(mean, self.block)
        overall = np.sqrt(np.mean(np.square(mean, dtype=np.float64))) if mean.size else 0.0
        reach = np.maximum(np.abs(rows).max(axis=1), overall) * self.headroom / (grid.step * self.limit)
        shifts: Shifts = np.clip(np.ceil(np.log2(np.maximum(reach, 1.0))), 0, self.largest(grid)).astype(np.uint8)
        return shifts

    def largest(self, grid: Grid) -> int:
        """The largest shift with which a site's values stay within the limit of ``grid``. Raises `UpdateError` when none does."""
        if grid.limit < self.limit:
            raise UpdateError(f"ring: {self.bits} bits a value leave the {grid.bits} bits of a sum over {grid.sites} sites; take fewer")
        return (grid.limit // self.limit).bit_length() - 1

    def narrow(self, codes: Codes, shifts: Shifts, seed: int | None) -> Codes:
        """32-bit codes (size,) as integers within ``limit``: to nearest without a seed, else unbiased but where they are cut."""
        wide = self._wide(shifts, codes.size)
        half = (np.int64(1) << wide) >> 1
        offset = half if seed is None else _words(codes.size, seed) & ((np.int64(1) << wide) - 1)
        narrowed: Codes = np.clip((codes + offset) >> wide, -self.limit, self.limit).astype(np.int32)
        return narrowed

    def widen(self, total: Codes, shifts: Shifts) -> Codes:
        """A sum of `narrow`'s integers as 32-bit codes of the round's grid."""
        return total << self._wide(shifts, total.size).astype(np.int32)

    def _wide(self, shifts: Shifts, size: int) -> NDArray[np.int64]:
        blocks = -(-size // self.block)
        if shifts.dtype != np.uint8 or shifts.shape != (blocks,) or int(shifts.max(initial=0)) >= WORD:
            raise UpdateError(f"ring: {shifts.dtype}{list(shifts.shape)} scales, {size} values need uint8[{blocks}] below {WORD}")
        return np.repeat(shifts, self.block)[:size].astype(np.int64)


def packed_size(size: int, width: int) -> int:
    """Bytes of ``size`` values of ``width`` bits in `pack`'s form."""
    return width // 8 * size + width % 8 * -(-size // 8)


def pack(codes: Codes, width: int) -> bytes:
    """The low ``width`` bits of int32 (size,): whole bytes first, one plane each, then the bits left, one plane each."""
    planes = np.ascontiguousarray(codes, "<i4").view(np.uint8).reshape(-1, 4)
    whole, rest = divmod(width, 8)
    parts = [planes[:, place].tobytes() for place in range(whole)]
    parts += [np.packbits(planes[:, whole] >> place & 1).tobytes() for place in range(rest)]
    return b"".join(parts)


def unpack(data: bytes | memoryview, width: int, size: int) -> Codes:
    """Inverse of `pack`, the bits above ``width`` being 0: int32 (size,). Raises `UpdateError` when ``data`` is of another size."""
    if not 1 <= width <= WORD or len(data) != packed_size(size, width):
        raise UpdateError(f"ring: {len(data)} bytes, {size} values of {width} bits take {packed_size(size, width)}")
    raw, (whole, rest) = np.frombuffer(data, np.uint8), divmod(width, 8)
    planes = np.zeros((size, 4), np.uint8)
    planes[:, :whole] = raw[: whole * size].reshape(whole, size).T
    for place, bits in enumerate(raw[whole * size :].reshape(rest, -(-size // 8))):
        planes[:, whole] |= np.unpackbits(bits, count=size) << np.uint8(place)
    return planes.reshape(-1).view("<i4").astype(np.int32, copy=False)


def settle(total: Codes, width: int) -> Codes:
    """The signed integers that the low ``width`` bits of a sum (modulo 2^32) stand for."""
    return (total << np.int32(WORD - width)) >> np.int32(WORD - width)


def as_ring(codec: Codec) -> Ring | None:
    """What takes the place of ``codec`` where sums are masked: a ring of as many bits; None where it has no such form."""
    if isinstance(codec, Ring):
        return codec
    return Ring(BITS[codec.kind], codec.block) if isinstance(codec, Int8 | Int4 | Int3 | Int2) else None


def _words(count: int, seed: int) -> NDArray[np.int64]:
    """Uniform 32-bit words of ``seed``."""
    return rounding.words(2 * count, seed).view("<u4").astype(np.int64)
