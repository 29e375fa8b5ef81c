"""Rules that take each coordinate alone: median, trimmed mean (Yin et al. 2018, arXiv 1803.01498), and Bulyan's second half.

Sorting runs down the parts for a whole block of coordinates at once: a network of elementwise minima and maxima, pruned to the
ranks that are wanted. Blocks are constant, so memory does not grow with the adapter beyond the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.errors import UpdateError
from fedpeft.schemes.base import Part, Phase
from fedpeft.schemes.robust.rule import admit, refuse_products
from fedpeft.tensors import Flat, Layout, Tensors

COLUMNS = 1 << 14
Step = tuple[int, int, bool, bool]
Finish = Callable[[list[Flat]], Flat]


@dataclass(frozen=True)
class Median:
    """The median of every coordinate; holds while fewer than half of the sites lie. Example counts have no say."""

    kind: ClassVar[str] = "median"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "fewer than half of the sites"
    cost: ClassVar[str] = "n log^2 n d"

    @property
    def least(self) -> int:
        """Three: of two, the median is their mean."""
        return 3

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse phases in which two roles that multiply move together."""
        refuse_products(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The middle value, or the mean of the two in the middle."""
        admit(self, current, parts, phase)
        low, high = (len(parts) - 1) // 2, len(parts) // 2
        return by_rank([part.values for part in parts], range(low, high + 1), lambda rows: average(rows[low : high + 1]))


@dataclass(frozen=True)
class Trimmed:
    """The mean of every coordinate without its ``share`` of largest and of smallest values. Example counts have no say."""

    share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.2
    kind: ClassVar[str] = "trimmed"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "floor(share n) sites"
    cost: ClassVar[str] = "n log^2 n d"

    @property
    def least(self) -> int:
        """As many as it takes to trim one value a side and keep one."""
        return max(3, ceil(1.0 / self.share - 1e-9))

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse phases in which two roles that multiply move together."""
        refuse_products(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The mean of the ranks that are left when ``floor(share n)`` fall away on either side."""
        admit(self, current, parts, phase)
        cut = floor(self.share * len(parts) + 1e-9)
        kept = range(cut, len(parts) - cut)
        return by_rank([part.values for part in parts], kept, lambda rows: average(rows[kept.start : kept.stop]))


def nearest_mean(values: Sequence[Tensors], count: int) -> Tensors:
    """Of every coordinate, the mean of the ``count`` values nearest to its median (Bulyan, arXiv 1802.07927, section 4)."""
    return by_rank(values, range(len(values)), lambda rows: _nearest(rows, count))


def by_rank(values: Sequence[Tensors], ranks: range, finish: Finish) -> Tensors:
    """Sort every coordinate over ``values`` and let ``finish`` make one row of the sorted ones; only ``ranks`` need be right.

    Raises:
        UpdateError: the result is not finite, so a part is not.
    """
    steps = network(len(values), ranks)
    out = np.empty(values[0].layout.size, np.float32)
    width = min(COLUMNS, out.size)
    spare = [np.empty(width, np.float32) for _ in range(len(values) + 2)]
    for start in range(0, out.size, COLUMNS):
        rows = [value.flat[start : start + COLUMNS] for value in values]
        sort_rows(rows, steps, [row[: rows[0].size] for row in spare])
        out[start : start + COLUMNS] = finish(rows)
    if not np.isfinite(out).all():
        raise UpdateError("combine: a part is not finite; drop that site and combine the others")
    return Tensors(values[0].layout, out)


def sort_rows(rows: list[Flat], steps: Sequence[Step], spare: list[Flat]) -> None:
    """Replace ``rows`` by their sorted values; nothing is written to a row that came in, only to ``spare`` buffers."""
    owned = [False] * len(rows)
    for low, high, keep_low, keep_high in steps:
        pair = rows[low], rows[high]
        if keep_low:
            rows[low] = np.minimum(*pair, out=spare.pop())
        if keep_high:
            rows[high] = np.maximum(*pair, out=spare.pop())
        spare.extend(old for place, old in zip((low, high), pair, strict=True) if owned[place])
        owned[low], owned[high] = keep_low, keep_high


@lru_cache(maxsize=64)
def network(count: int, ranks: range) -> tuple[Step, ...]:
    """Comparisons that sort ``count`` values as far as ``ranks`` need: ``(low, high, keep the smaller, keep the larger)``."""
    wanted, kept = set(ranks), []
    for low, high in reversed(_merge_exchange(count)):
        if low in wanted or high in wanted:
            kept.append((low, high, low in wanted, high in wanted))
            wanted |= {low, high}
    return tuple(reversed(kept))


def average(rows: Sequence[Flat]) -> Flat:
    """The mean of ``rows``."""
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total * np.float32(1.0 / len(rows))


def _merge_exchange(count: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming 3, algorithm 5.2.2 M), for any ``count``."""
    pairs, top = [], 1 << max((count - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            d, q, r = q - p, q // 2, p
        p //= 2
    return pairs


def _nearest(rows: list[Flat], count: int) -> Flat:
    """The values nearest to the median are neighbours in rank: the window whose farther end is nearest."""
    middle = average(rows[(len(rows) - 1) // 2 : len(rows) // 2 + 1])
    total = np.add.reduce(rows[:count], axis=0, dtype=np.float64)
    best, reach = total.copy(), np.maximum(middle - rows[0], rows[count - 1] - middle)
    for start in range(1, len(rows) - count + 1):
        total += rows[start + count - 1].astype(np.float64) - rows[start - 1]
        far = np.maximum(middle - rows[start], rows[start + count - 1] - middle)
        nearer = far < reach
        np.copyto(best, total, where=nearer)
        np.copyto(reach, far, where=nearer)
    return np.asarray(best / count, np.float32)
