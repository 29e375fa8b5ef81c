"""Small digits several to a byte: five of base 3, two of base 7 or 15, one of base 255; neighbours share a byte and its code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError

Bytes = NDArray[np.uint8]


def per_byte(base: int) -> int:
    """How many digits of ``base`` one byte holds."""
    count = 1
    while base ** (count + 1) <= 256:
        count += 1
    return count


def pack(digits: Bytes, base: int) -> Bytes:
    """``digits`` below ``base``, uint8 (count,), as bytes, the last filled with zeros."""
    group = per_byte(base)
    padded = np.zeros(-(-digits.size // group) * group, np.uint8)
    padded[: digits.size] = digits
    packed = padded[::group].copy()
    for place in range(1, group):
        packed *= np.uint8(base)
        packed += padded[place::group]
    return packed


def unpack(packed: Bytes, base: int, count: int) -> Bytes:
    """Inverse of `pack`. Raises `UpdateError` on a byte that no digits make, or another number of bytes."""
    group = per_byte(base)
    if packed.size != -(-count // group) or int(packed.max(initial=0)) >= base**group:
        raise UpdateError(f"codec: {packed.size} bytes up to {packed.max(initial=0)} are not {count} digits of base {base}")
    table = np.arange(256)[:, None] // base ** np.arange(group - 1, -1, -1) % base
    return table.astype(np.uint8)[packed].reshape(-1)[:count]
