"""NF4: 16 levels at quantiles of a normal, times each block's largest magnitude (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.wire.codecs import digits, entropy, frames, rounding, scales
from fedpeft.wire.codecs.integers import Block

Flat = NDArray[np.float32]

LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""Appendix E of the paper."""


@dataclass(frozen=True)
class NF4:
    """16 levels, dense near 0: a better fit than int4 where a block is normal and its largest value no outlier."""

    block: Block = 64

    kind: ClassVar[str] = "nf4"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return 2 * frames.LENGTH.size + scales.most(-(-size // self.block)) + 1 + -(-size // 2)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        rows = rounding.rows_of(flat, self.block)
        head, peaks = scales.pack(np.abs(rows).max(axis=1))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rows /= peaks[:, None]
        rows[~np.isfinite(rows)] = 0.0
        codes = _levels(np.clip(rows, -1.0, 1.0, out=rows).reshape(-1)[: flat.size], seed)
        return frames.join(head, entropy.squeeze(digits.pack(codes, 16)))

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        head, body = frames.split(data, 2)
        steps = scales.unpack(head, blocks := -(-size // self.block))
        rows = np.zeros((blocks, self.block), np.float32)
        rows.reshape(-1)[:size] = LEVELS[digits.unpack(entropy.expand(body, -(-size // 2)), 16, size)]
        rows *= steps[:, None]
        return rows.reshape(-1)[:size]


def _levels(values: Flat, seed: int | None) -> NDArray[np.uint8]:
    """The place of the nearest level of ``values`` in [-1, 1], or of either neighbour in proportion to how near it is."""
    if seed is None:
        return np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, values).astype(np.uint8)
    low = np.clip(np.searchsorted(LEVELS, values, side="right") - 1, 0, 14)
    share = (values - LEVELS[low]) / (LEVELS[1:] - LEVELS[:-1])[low]
    return (low + (share > rounding.uniform(values.shape, seed))).astype(np.uint8)
