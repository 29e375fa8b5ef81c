"""How the sites' updates become one: the streaming sum, in constant memory and the same bits in any order."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np

from fedpeft.errors import UpdateError
from fedpeft.tensors import Layout
from fedpeft.update import BLOCK, WEIGHT_STEP, Codes, Counters, Grid, Update, add_counters, snap_counters


class Combine(Protocol):
    """A reduction of updates; ``sum_only`` tells whether it needs no more than their sum."""

    sum_only: ClassVar[bool]

    def add(self, *updates: Update) -> None:
        """Take ``updates`` in; nothing of them is kept by reference."""
        ...

    def result(self) -> Update:
        """What was taken in so far, as one update."""
        ...


class Sum:
    """Adds updates in place as they arrive.

    Memory is one vector of codes, whatever the number of sites. Codes are 32-bit integers that never wrap: each is
    checked against ``count * grid.limit`` and the counts against ``grid.sites``, so every partial sum stays within 2^30.
    A refused update leaves the sum as it was.
    """

    sum_only: ClassVar[bool] = True

    def __init__(self, layout: Layout, grid: Grid) -> None:
        self._total = Update.zero(layout, grid)
        self._lent = False

    def add(self, *updates: Update) -> None:
        """Add ``updates``, all or none; several in one call share a pass over the sum (1.2 times as fast by fours).

        Raises:
            UpdateError: another layout, grid, length or type; a code beyond the bound; a weight or counter out of range; more
                updates than the grid has sites for.
        """
        weight, counters, count = self._total.weight, self._total.counters, self._total.count
        for update in updates:
            counters = add_counters(counters, self._admit(update, count))
            weight, count = weight + update.weight, count + update.count
        codes = self._total.codes.copy() if self._lent else self._total.codes
        _accumulate(codes, updates)
        self._lent = False
        self._total = Update(self._total.layout, self._total.grid, codes, weight, counters, count)

    def result(self) -> Update:
        """The sum so far; later additions do not change it."""
        self._lent = True
        return self._total

    def _admit(self, update: Update, count: int) -> Counters:
        self._total.check(update)
        if update.codes.dtype != np.int32 or update.codes.shape != (update.layout.size,):
            shape = f"{update.codes.dtype}{list(update.codes.shape)}"
            raise UpdateError(f"update: codes are {shape}, the plan needs int32[{update.layout.size}]; do both sides run one version?")
        if update.count < 1 or count + update.count > self._total.grid.sites:
            raise UpdateError(
                f"update: stands for {update.count} sites after {count}; the round's grid has room for {self._total.grid.sites}, so the "
                "sum could wrap; plan the round with more sites"
            )
        if not 0.0 < update.weight <= update.count or update.weight % WEIGHT_STEP:
            raise UpdateError(
                f"update: weight {update.weight} of {update.count} site(s) must be in (0, {update.count}] and a multiple of 2^-20; "
                "the site weighs itself outside the plan"
            )
        return snap_counters(update.counters)


def _accumulate(total: Codes, updates: tuple[Update, ...]) -> None:
    """Add every update's codes block by block; the block of the sum and of the update meet in the cache for add and check."""
    parts = [(update.codes, update.count * update.grid.limit) for update in updates]
    for start in range(0, total.size, BLOCK):
        block = total[start : start + BLOCK]
        for place, (vector, bound) in enumerate(parts):
            codes = vector[start : start + BLOCK]
            np.add(block, codes, out=block)
            if np.maximum.reduce(codes) > bound or np.minimum.reduce(codes) < -bound:
                _undo(total, updates, start, place)
                raise UpdateError(_beyond(updates[place], start, bound))


def _undo(total: Codes, updates: tuple[Update, ...], start: int, place: int) -> None:
    """Take back what was added up to update ``place`` of the block at ``start``; wrapped values come back exactly."""
    for index, update in enumerate(updates):
        stop = start + BLOCK if index <= place else start
        np.subtract(total[:stop], update.codes[:stop], out=total[:stop])


def _beyond(update: Update, start: int, bound: int) -> str:
    codes = update.codes[start : start + BLOCK].astype(np.int64)
    index = int(np.argmax(np.abs(codes)))
    name = next(name for name, span in update.layout.spans.items() if start + index < span.stop)
    step = update.grid.step
    return (
        f"update: {name} holds {codes[index] * step:.3g}, a site may send at most {bound * step:.3g} in size; "
        "it answered another plan or did not clip"
    )
