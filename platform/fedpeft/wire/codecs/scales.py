"""One byte a block for its scale: eighths of octaves below the largest scale of the message, always rounded up."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.wire.codecs import entropy, frames

Flat = NDArray[np.float32]

TOP = struct.Struct("<f")
PER_OCTAVE = 8


def pack(peaks: Flat) -> tuple[bytes, Flat]:
    """Scales (blocks,), at least 0, as bytes; and what `unpack` will read: as large or larger, at most by an eighth of an octave.

    Scales 32 octaves below the largest become that small one, and 0 stays 0.
    """
    top = np.float32(peaks.max(initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.floor(PER_OCTAVE * (np.log2(np.float64(top)) - np.log2(peaks, dtype=np.float64)) + 1e-9)
    levels = np.where(peaks > 0, np.clip(255 - below, 1, 255), 0).astype(np.uint8)
    return frames.join(TOP.pack(top), entropy.squeeze(levels)), _values(top, levels)


def unpack(data: bytes | memoryview, blocks: int) -> Flat:
    """Inverse of `pack`: scales float32 (blocks,). Raises `UpdateError` when they are malformed or not finite."""
    head, levels = frames.split(data, 2)
    top = TOP.unpack(head)[0] if len(head) == TOP.size else float("nan")
    if not 0.0 <= top < float("inf"):
        raise UpdateError(f"codec: the largest scale is {top}; it must be finite and not negative")
    return _values(np.float32(top), entropy.expand(levels, blocks))


def most(blocks: int) -> int:
    """The most bytes of ``blocks`` scales."""
    return 2 * frames.LENGTH.size + TOP.size + 1 + blocks


def _values(top: np.float32, levels: NDArray[np.uint8]) -> Flat:
    table = np.float64(top) * 2.0 ** ((np.arange(256) - 255.0) / PER_OCTAVE)
    table[0] = 0.0
    return table.astype(np.float32)[levels]
