"""Rounding of scaled values to integers: to nearest, or to either neighbour so that the mean over seeds is the value.

Random words are taken raw from the generator (numpy keeps these streams the same between versions), 16 bits a value: the
bias of one rounding is below 2^-17 of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError

Flat = NDArray[np.float32]


def words(count: int, seed: int) -> NDArray[np.uint16]:
    """``count`` uniform 16-bit words of ``seed``."""
    raw: NDArray[np.uint64] = np.random.SFC64(seed).random_raw(-(-count // 4))
    return raw.astype("<u8", copy=False).view(np.uint16)[:count]


def uniform(shape: tuple[int, ...], seed: int) -> Flat:
    """Values in (0, 1), float32, whose mean is 1/2."""
    drawn = words(int(np.prod(shape)), seed).reshape(shape).astype(np.float32)
    drawn += np.float32(0.5)
    drawn *= np.float32(2.0**-16)
    return drawn


def whole(scaled: Flat, seed: int | None) -> Flat:
    """``scaled`` rounded in place: to nearest without a seed, else up with the fraction as probability."""
    if seed is None:
        return np.rint(scaled, out=scaled)
    scaled += uniform(scaled.shape, seed)
    return np.floor(scaled, out=scaled)


def rows_of(flat: Flat, block: int) -> Flat:
    """``flat`` as (blocks, block), a new array; the last row is filled with zeros. Raises `UpdateError` when not finite."""
    if not np.isfinite(flat).all():
        raise UpdateError("codec: the delta is not finite; lower the learning rate or clip gradients")
    rows = np.zeros((-(-flat.size // block), block), np.float32)
    rows.reshape(-1)[: flat.size] = flat
    return rows
