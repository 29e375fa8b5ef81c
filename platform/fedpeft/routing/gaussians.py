"""Tasks as Gaussians: regularised discriminant analysis from sums alone, and how near a text is to its task for one of no task.

A task's covariance is a mean of its own and of all tasks' together (Friedman 1989, doi 10.1080/01621459.1989.10478752), shrunk towards a
sphere by as much as its own size tells (OAS: Chen et al. 2010, arXiv 0907.4698, eq. 23). Shape legend: N texts, E tasks, D values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedpeft.errors import AdapterError
from fedpeft.routing.moments import Exact, Measure, Rows, narrowed

PRIOR = 6.0
"""The pool's covariance counts as much as this many texts of the task for each value of an embedding."""
RELATIVE = 0.75
"""How much of a text's distance to the centre of all tasks is taken off its distance to a task."""
FLOOR, TINY = 1e-3, 1e-9
"""The least variance over the mean one, and at all."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A density: ``mean`` (D,), ``whiten`` (D, D), a root of the inverse covariance; ``volume`` is the covariance's log-determinant."""

    mean: Exact
    whiten: Exact
    volume: float

    @staticmethod
    def of(mean: Exact, covariance: Exact) -> Gaussian:
        """The density of ``covariance`` with the least variance added; where noise left it none, smaller ones are raised to that."""
        least = max(FLOOR * float(np.trace(covariance)) / len(mean), TINY)
        try:
            lower = np.linalg.cholesky(covariance + least * np.eye(len(mean)))
        except np.linalg.LinAlgError:
            sizes, axes = np.linalg.eigh(covariance)
            sizes = np.maximum(sizes, least)
            return Gaussian(mean, axes / np.sqrt(sizes), float(np.log(sizes).sum()))
        return Gaussian(mean, np.linalg.inv(lower).T, 2.0 * float(np.log(np.diag(lower)).sum()))

    def distances(self, rows: Exact) -> Exact:
        """Squared Mahalanobis distances (N,) of ``rows`` (N, D)."""
        white = (rows - self.mean) @ self.whiten
        found: Exact = np.einsum("nd,nd->n", white, white)
        return found


@dataclass(frozen=True, eq=False)
class Gaussians:
    """``tasks``, and for each the place of its ``backgrounds``: the covariance inside tasks around the centre of all of a pool."""

    tasks: tuple[Gaussian, ...]
    backgrounds: tuple[Gaussian, ...]
    places: tuple[int, ...]

    @staticmethod
    def of(measures: Sequence[Measure]) -> Gaussians:
        """Densities of tasks, each in its own pool. Raises `AdapterError` when their widths differ."""
        widths = sorted({part.width for one in measures for part in (one.own, one.pool)})
        if len(widths) != 1:
            raise AdapterError(f"moments: {len(measures)} tasks with embeddings of {widths} values; make all cards with one encoder")
        fitted = tuple(Gaussian.of(one.own.mean, shrunk(_blended(one), one.pool.count)) for one in measures)
        keys = [one.pool.mean.tobytes() + one.pool.covariance.tobytes() for one in measures]
        pools = dict(zip(keys, (one.pool for one in measures), strict=True))
        backgrounds = tuple(Gaussian.of(pool.mean, shrunk(pool.covariance, pool.count)) for pool in pools.values())
        return Gaussians(fitted, backgrounds, tuple(map(list(pools).index, keys)))

    def read(self, embeddings: Rows) -> tuple[Exact, Exact]:
        """Of each text (N, D) and task the log-density, up to a constant, and the closeness, both (N, E).

        Closeness is ``(0.75 d(x, centre) - d(x, task)) / D`` with squared Mahalanobis distances d, within [-1, 1]: a relative Mahalanobis
        distance (Ren et al. 2021, arXiv 2106.09022), since a text that is far from everything is far from its own task as well.

        Raises:
            AdapterError: embeddings of another width.
        """
        rows, width = narrowed(embeddings), len(self.tasks[0].mean)
        if rows.shape[1] != width:
            raise AdapterError(f"router: an embedding has {rows.shape[1]} values, the cards have {width}; they were made by another base")
        near = np.stack([task.distances(rows) for task in self.tasks], axis=1)
        far = np.stack([background.distances(rows) for background in self.backgrounds], axis=1)[:, self.places]
        volumes = np.array([task.volume for task in self.tasks])
        return -0.5 * (near + volumes), np.clip((RELATIVE * far - near) / width, -1.0, 1.0)


@lru_cache(maxsize=8)
def gaussians(measures: tuple[Measure, ...]) -> Gaussians:
    """As `Gaussians.of`; kept, since routers are made anew for every request."""
    return Gaussians.of(measures)


def shrunk(covariance: Exact, count: float) -> Exact:
    """``covariance`` of ``count`` texts, moved towards a sphere of the same trace: the oracle-approximating shrinkage."""
    width, trace, square = len(covariance), float(np.trace(covariance)), float(np.sum(covariance * covariance))
    spread = (count + 1.0 - 2.0 / width) * (square - trace * trace / width)
    share = min(1.0, ((1.0 - 2.0 / width) * square + trace * trace) / spread) if spread > 0.0 else 1.0
    return (1.0 - share) * covariance + share * trace / width * np.eye(width)


def _blended(one: Measure) -> Exact:
    share = one.own.count / (one.own.count + PRIOR * one.own.width)
    return share * one.own.covariance + (1.0 - share) * one.pool.covariance
