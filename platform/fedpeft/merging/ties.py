"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim each task vector, elect a sign per coordinate, average what agrees with it.

The rule needs four sums over tasks and nothing else, so it also works where single task vectors must stay hidden: a task trims
its own vector, and the sums of its positive part, its negative part and the two indicators decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import AdapterError
from fedpeft.factors import Product, Truncated
from fedpeft.merging.arithmetic import Rank
from fedpeft.merging.base import cut
from fedpeft.tensors import Flat

Values = NDArray[np.floating[Any]]
Density = Annotated[float, Field(gt=0.0, le=1.0)]
ROWS = 256
"""Rows of a weight change that are merged at a time."""


@dataclass(frozen=True)
class FourSums:
    """Σ w τ⁺, Σ w τ⁻, Σ w [τ > 0] and Σ w [τ < 0] over tasks, of one shape; they add up."""

    positive: Values
    negative: Values
    above: Values
    below: Values

    @staticmethod
    def of(trimmed: Values, weight: float = 1.0) -> FourSums:
        """What one task adds."""
        above, below = trimmed > 0, trimmed < 0
        zero = np.zeros((), trimmed.dtype)
        return FourSums(weight * np.where(above, trimmed, zero), weight * np.where(below, trimmed, zero), weight * above, weight * below)

    def __add__(self, other: FourSums) -> FourSums:
        return FourSums(self.positive + other.positive, self.negative + other.negative, self.above + other.above, self.below + other.below)


def trim(x: Values, density: float) -> Values:
    """``x`` with all but the ``density`` share of entries of largest size set to zero."""
    return np.where(np.abs(x) >= threshold(x, density), x, np.zeros((), x.dtype))


def threshold(x: Values, density: float) -> float:
    """The size of the smallest entry that `trim` keeps."""
    keep = ceil(density * x.size)
    return float(np.partition(np.abs(x), x.size - keep, axis=None)[x.size - keep])


def ties_four_sums(sums: FourSums) -> Values:
    """Where positive parts outweigh negative ones their mean over the tasks that have one, else the mean of the negative ones."""
    up = sums.positive + sums.negative >= 0
    total, count = np.where(up, sums.positive, sums.negative), np.where(up, sums.above, sums.below)
    return np.asarray(np.divide(total, count, out=np.zeros_like(total), where=count != 0))


def ties(terms: Iterable[tuple[float, Values]]) -> Values:
    """The rule on trimmed task vectors of one shape. Raises `AdapterError` when a weight is not positive."""
    total: FourSums | None = None
    for weight, x in terms:
        if weight <= 0:
            raise AdapterError(f"merge: weight {weight} would turn a vote of TIES; give positive weights, or use arithmetic")
        total = FourSums.of(x, weight) if total is None else total + FourSums.of(x, weight)
    if total is None:
        raise AdapterError("merge: nothing to merge; give at least one task vector")
    return ties_four_sums(total)


@dataclass(frozen=True)
class Ties:
    """TIES with the ``density`` share of each task vector kept and the result times ``scale``.

    For LoRA the task vector is the weight change B A, trimmed per module: the rule picks among its entries, which no factors express,
    so the one weight change being merged is held in full, and cut back to ``rank`` (none given: the largest rank merged). `Knots` needs
    neither. Weights are shares of vote and mean, and must be positive.
    """

    kind: ClassVar[str] = "ties"

    density: Density = 0.2
    scale: float = 1.0
    rank: Rank = None

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """One weight change at a time for its threshold, then all by blocks of rows."""
        floors = [threshold(product.b @ product.a, self.density) for _, product in terms]
        out = np.empty((len(terms[0][1].b), terms[0][1].a.shape[1]), np.float32)
        for start in range(0, len(out), ROWS):
            rows = slice(start, start + ROWS)
            out[rows] = self.scale * ties(_kept(terms, floors, rows))
        return cut([Product(out, np.eye(out.shape[1], dtype=np.float32))], self.rank, terms)

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """The rule on the tensors of one role together."""
        return (self.scale * ties((weight, trim(x, self.density)) for weight, x in terms)).astype(np.float32)


def _kept(terms: Sequence[tuple[float, Product]], floors: Sequence[float], rows: slice) -> Iterable[tuple[float, Values]]:
    for (weight, product), floor in zip(terms, floors, strict=True):
        block = product.b[rows] @ product.a
        yield weight, np.where(np.abs(block) >= floor, block, np.zeros((), block.dtype))
