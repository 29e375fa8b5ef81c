"""Update: the weighted sum of deltas and counters, the only thing that travels up.

A site's delta is multiplied by its weight and rounded to whole multiples of a grid step that the plan fixes for the
round; what travels are 32-bit integers. Integer addition is exact, so the sum is the same bits in whatever order the
updates arrive, it takes constant memory, and it is already the ring that secure aggregation masks. Each site rounds by
at most half a step, so the mean is off by at most half a step over the mean weight, whatever the number of sites; the
step itself doubles as the cohort doubles, because the sum has to stay within 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite, log2

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.tensors import Layout, Tensors

Codes = NDArray[np.int32]
Counters = Mapping[str, tuple[float, ...]]

WORD = 32
"""Bits of a code."""
COUNTER_STEP = 2.0**-20
COUNTER_LIMIT = 2.0**32
"""Largest counter of one site; sums are exact in float64, hence the same in any order, as long as they stay below 2^33."""
WEIGHT_STEP = 2.0**-20
TRAIN_COUNTERS = {"train.loss": 2, "train.examples": 1, "train.seen": 1, "train.tokens": 1}
"""What travels beside trained tensors, and how many values each has."""
HOLDERS = {"train.holders": 1}
"""Beside them where sites that hold nothing of a task answer zeros: how many hold it."""
BLOCK = 1 << 17
"""Values per block: checks and sums of one block stay in the second-level cache."""


REACH = 2.0**80
"""The largest reach of a grid, and one over the smallest: with any cohort its step is then a normal float32."""

RANGE = f"{1 / REACH:.0e} to {REACH:.0e}"


def train_counters(blind: bool) -> dict[str, int]:
    """What travels beside trained tensors, where holdings are hidden or not."""
    return {**TRAIN_COUNTERS, **(HOLDERS if blind else {})}


@dataclass(frozen=True)
class Grid:
    """The fixed-point grid of one round: values are multiples of ``step``, and ``sites`` of them never leave ``bits`` bits.

    ``reach`` is the largest weighted delta that one site may send in any coordinate.
    """

    sites: int
    reach: float = 2.0
    bits: int = WORD

    def __post_init__(self) -> None:
        if self.sites < 1 or not 1 / REACH <= self.reach <= REACH:
            raise UpdateError(f"grid: sites={self.sites}, reach={self.reach}; sites must be at least 1 and reach positive, {RANGE}")
        if not self.sites.bit_length() + 2 <= self.bits <= WORD:
            raise UpdateError(f"grid: {self.bits} bits for {self.sites} sites; {self.sites.bit_length() + 2} to {WORD} hold their sum")

    @property
    def step(self) -> float:
        """Distance between two values of the grid: a power of two."""
        return float(2.0 ** (ceil(log2(self.reach)) + ceil(log2(self.sites)) - self.bits + 2))

    @property
    def limit(self) -> int:
        """The largest code that one site may send; ``sites`` times it is below 2^(bits - 1)."""
        return (1 << self.bits - 2) // (1 << ceil(log2(self.sites)))


@dataclass(frozen=True, eq=False)
class Update:
    """A weighted sum over ``count`` sites: integer ``codes`` on ``grid``, the sum of weights, and sums of counters.

    Laws (tested with hypothesis): ``+`` is associative and commutative bit for bit, `Update.zero` is its unit, and
    ``mean`` differs from the float64 weighted mean of the deltas by at most ``count / weight`` half steps and one rounding to float32.
    """

    layout: Layout
    grid: Grid
    codes: Codes
    weight: float
    counters: Counters = field(default_factory=dict)
    count: int = 1

    @staticmethod
    def zero(layout: Layout, grid: Grid) -> Update:
        """The neutral element."""
        return Update(layout, grid, np.zeros(layout.size, np.int32), 0.0, {}, 0)

    @staticmethod
    def encode(delta: Tensors, weight: float, counters: Counters, grid: Grid) -> Update:
        """Round ``weight * delta`` to the grid.

        ``weight`` is in (0, 1]: the share of the largest example count that the plan allows.

        Raises:
            UpdateError: a value is not finite, or larger than ``grid.reach``.
        """
        if not 0.0 < weight <= 1.0:
            raise UpdateError(f"update: weight {weight} is outside (0, 1]; it is the site's share of the plan's largest weight")
        weight = max(round(weight / WEIGHT_STEP), 1) * WEIGHT_STEP
        peak = max(float(delta.flat.max(initial=0.0)), -float(delta.flat.min(initial=0.0))) * (weight / grid.step)
        if not isfinite(peak):
            raise UpdateError("update: the trained tensors are not finite; lower the learning rate or clip gradients")
        if peak > grid.limit:
            raise UpdateError(
                f"update: largest weighted delta is {peak * grid.step:.3g}, the plan allows {grid.limit * grid.step:.3g}; "
                "lower the learning rate or raise wire.reach"
            )
        return Update(delta.layout, grid, _rounded(delta.flat, weight / grid.step), weight, snap_counters(counters), 1)

    def __add__(self, other: Update) -> Update:
        self.check(other)
        return Update(
            self.layout,
            self.grid,
            self.codes + other.codes,
            self.weight + other.weight,
            add_counters(self.counters, other.counters),
            self.count + other.count,
        )

    def check(self, other: Update) -> None:
        """Raise `UpdateError` unless ``other`` may be added to this sum."""
        if self.layout != other.layout:
            raise UpdateError("update: layouts differ; the site trained another method, rank or set of modules than the plan says")
        if self.grid != other.grid:
            raise UpdateError(f"update: grid {other.grid} differs from the round's {self.grid}; the site answered another round")

    def mean(self) -> Tensors:
        """Sum over weights: the weighted mean delta, float32. Raises `UpdateError` when nothing was summed."""
        if self.weight <= 0:
            raise UpdateError("update: the sum of weights is zero; no site contributed")
        flat = np.empty(self.layout.size, np.float32)
        np.multiply(self.codes, self.grid.step / self.weight, out=flat, dtype=np.float64, casting="same_kind")
        return Tensors(self.layout, flat)


def _rounded(values: NDArray[np.float32], factor: float) -> Codes:
    """``factor * values`` to the nearest integers, in float64 as ever, without a second vector in memory."""
    codes, scaled = np.empty(values.shape, np.int32), np.empty(min(BLOCK, values.size), np.float64)
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        part = np.multiply(block, factor, out=scaled[: block.size], dtype=np.float64)
        np.copyto(codes[start : start + BLOCK], np.rint(part, out=part), casting="unsafe")
    return codes


def snap_counters(counters: Mapping[str, Sequence[float]]) -> Counters:
    """Round counters to multiples of 2^-20, so that their float64 sums are exact. Raises `UpdateError` when not finite."""
    return {name: tuple(_snap(name, value) for value in values) for name, values in sorted(counters.items())}


def _snap(name: str, value: float) -> float:
    if not isfinite(value) or abs(value) > COUNTER_LIMIT:
        raise UpdateError(f"counter {name}: {value} is not finite or beyond {COUNTER_LIMIT:.0f}; the site's evaluation diverged")
    return round(value / COUNTER_STEP) * COUNTER_STEP


def add_counters(left: Counters, right: Counters) -> Counters:
    """Add counters by name and position; a name that one side lacks counts as zeros."""
    total = dict(left)
    for name, values in right.items():
        mine = total.get(name)
        if mine is None:
            total[name] = values
        elif len(mine) != len(values):
            raise UpdateError(f"counter {name}: {len(values)} values, the sum has {len(mine)}; do the sites run one version?")
        else:
            total[name] = tuple(a + b for a, b in zip(mine, values, strict=True))
    return dict(sorted(total.items()))
