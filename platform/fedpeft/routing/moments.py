"""A task's embeddings as sums: how many, their mean and their covariance. Sums add up over sites, under masks and with noise.

Shape legend: N texts, D values of an embedding, P = (D + 1)(D + 2) / 2 values of a packed triangle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpeft.errors import AdapterError

MOMENTS = "embedding.moments"
"""The counter of `sums`."""
WIDEST = 512
"""Values of an embedding that are kept: a triangle of more would cost megabytes."""
BUCKETS = 1 << 14
"""Of `fedpeft.routing.ngrams`."""
Rows = NDArray[np.floating[Any]]
Exact = NDArray[np.float64]
Texts = TypeVar("Texts", Rows, list[str])


def _none() -> Exact:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class Moments:
    """``count`` texts, the ``mean`` (D,) of their embeddings, the ``covariance`` (D, D) around it, and counts of their ``ngrams``.

    Those are (`BUCKETS`,), or (0,) where they were not counted.
    """

    count: float
    mean: Exact
    covariance: Exact
    ngrams: Exact = field(default_factory=_none)

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class Measure:
    """What a task is measured by: its ``own`` moments, and the ``pool`` of all tasks that it was trained beside.

    Both are in a task's card, so that what is near to it does not depend on which other tasks are served.
    """

    own: Moments
    pool: Moments


def sums(embeddings: Rows) -> Exact:
    """The upper triangle (P,), row by row, of the sum of ``(1, x)(1, x)'`` over ``embeddings`` (N, D): count, sum and second moments."""
    rows = narrowed(embeddings)
    whole = np.column_stack([np.ones(len(rows)), rows])
    return packed(whole.T @ whole)


def moments(total: ArrayLike) -> Moments:
    """What `sums`, added up, say.

    Raises:
        AdapterError: they are no triangle, not finite, or of no text.
    """
    values = np.asarray(total, np.float64)
    whole = unpacked(values)
    count = float(values[0]) if values.size > 1 else 0.0
    if not (np.isfinite(values).all() and count >= 1.0):
        raise AdapterError(
            f"moments: sums over {count:g} texts, {values.size} values, all finite: {np.isfinite(values).all()}; needs texts"
        )
    mean = whole[0, 1:] / count
    return Moments(count, mean, whole[1:, 1:] / count - np.outer(mean, mean))


def values_of(width: int) -> int:
    """P, for embeddings of ``width`` values before they are narrowed."""
    side = min(width, WIDEST) + 1
    return side * (side + 1) // 2


def packed(symmetric: Exact) -> Exact:
    """The upper triangle of a symmetric matrix, row by row."""
    return symmetric[np.triu_indices(len(symmetric))]


def unpacked(triangle: ArrayLike) -> Exact:
    """Inverse of `packed`. Raises `AdapterError` when the number of values is none of a triangle."""
    values = np.asarray(triangle, np.float64)
    side = (isqrt(8 * values.size + 1) - 1) // 2
    if values.ndim != 1 or side < 1 or side * (side + 1) // 2 != values.size:
        raise AdapterError(f"moments: {values.size} values are no triangle of a symmetric matrix; do both sides run one version?")
    found = np.zeros((side, side))
    found[np.triu_indices(side)] = values
    return np.triu(found) + np.triu(found, 1).T


def narrowed(embeddings: Rows) -> Exact:
    """``embeddings`` (N, D) in float64, of at most `WIDEST` values: wider ones are projected on fixed random signs.

    Distances are kept to within a few per cent (Achlioptas 2003, doi 10.1016/S0022-0000(03)00025-4, theorem 1.1).
    """
    rows = np.asarray(embeddings, np.float64)
    return rows if rows.shape[1] <= WIDEST else rows @ _signs(rows.shape[1])


@lru_cache(maxsize=2)
def _signs(width: int) -> Exact:
    """Signs over the root of their number (D, `WIDEST`), the same on every machine: PCG64's raw stream is part of its definition."""
    words = np.random.PCG64(WIDEST).random_raw(width * WIDEST // 64).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8)).reshape(width, WIDEST)
    signs: Exact = (2.0 * bits - 1.0) / np.sqrt(WIDEST)
    return signs


def halves(embeddings: Texts) -> tuple[Texts, Texts]:
    """Rows for `sums`, and others that thresholds are found on: a covariance is always nearer to the rows that it was made of."""
    return embeddings[::2], embeddings[1::2] if len(embeddings) > 1 else embeddings


def pooled(tasks: Iterable[Moments]) -> Moments:
    """What ``tasks`` share: the mean of their means, the covariance inside them over all their texts, the mean of their n-grams' shares.

    The last are as many as all tasks' together, and none where one of them was not counted.

    Raises:
        AdapterError: their widths differ, or there is none.
    """
    known = list(tasks)
    widths = sorted({one.width for one in known})
    if len(widths) != 1:
        raise AdapterError(f"moments: {len(known)} tasks with embeddings of {widths} values; make all cards with one encoder")
    count = sum(one.count for one in known)
    within = sum((one.count * one.covariance for one in known), np.zeros(())) / max(count - len(known), 1.0)
    return Moments(count, np.mean([one.mean for one in known], axis=0), np.asarray(within), _mixed([one.ngrams for one in known]))


def _mixed(counts: list[Exact]) -> Exact:
    totals = [float(one.sum()) for one in counts]
    if min(totals) <= 0.0:
        return _none()
    shares: Exact = np.mean([one / total for one, total in zip(counts, totals, strict=True)], axis=0)
    return shares * sum(totals)
