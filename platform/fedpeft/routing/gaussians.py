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
from fedpeft.routing.moments import Exact, Moments, Rows, narrowed, pooled

CLOSENESS = "closeness"
"""The counter of histograms of own texts' closeness."""
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
    """``tasks``, and the ``background``: the covariance inside tasks around the centre of all of them."""

    tasks: tuple[Gaussian, ...]
    background: Gaussian

    @staticmethod
    def of(tasks: Sequence[Moments], pool: Moments) -> Gaussians:
        """Densities of ``tasks`` beside what `pooled` makes of all. Raises `AdapterError` when their widths differ."""
        if any(task.width != pool.width for task in tasks):
            raise AdapterError(f"moments: tasks of {[task.width for task in tasks]} values beside a pool of {pool.width}")
        fitted = tuple(Gaussian.of(task.mean, shrunk(_blended(task, pool), pool.count)) for task in tasks)
        return Gaussians(fitted, Gaussian.of(pool.mean, shrunk(pool.covariance, pool.count)))

    def read(self, embeddings: Rows) -> tuple[Exact, Exact]:
        """Of each text (N, D) and task the log-density, up to a constant, and the closeness, both (N, E).

        Closeness is ``(0.75 d(x, centre) - d(x, task)) / D`` with squared Mahalanobis distances d, within [-1, 1]: a relative Mahalanobis
        distance (Ren et al. 2021, arXiv 2106.09022), since a text that is far from everything is far from its own task as well.

        Raises:
            AdapterError: embeddings of another width.
        """
        rows, width = narrowed(embeddings), len(self.background.mean)
        if rows.shape[1] != width:
            raise AdapterError(f"router: an embedding has {rows.shape[1]} values, the cards have {width}; they were made by another base")
        near = np.stack([task.distances(rows) for task in self.tasks], axis=1)
        volumes = np.array([task.volume for task in self.tasks])
        apart = RELATIVE * self.background.distances(rows)[:, None] - near
        return -0.5 * (near + volumes), np.clip(apart / width, -1.0, 1.0)


@lru_cache(maxsize=8)
def gaussians(tasks: tuple[Moments, ...]) -> Gaussians:
    """Densities of ``tasks`` in a pool of their own; kept, since routers are made anew for every request."""
    return Gaussians.of(tasks, pooled(tasks))


def shrunk(covariance: Exact, count: float) -> Exact:
    """``covariance`` of ``count`` texts, moved towards a sphere of the same trace: the oracle-approximating shrinkage."""
    width, trace, square = len(covariance), float(np.trace(covariance)), float(np.sum(covariance * covariance))
    spread = (count + 1.0 - 2.0 / width) * (square - trace * trace / width)
    share = min(1.0, ((1.0 - 2.0 / width) * square + trace * trace) / spread) if spread > 0.0 else 1.0
    return (1.0 - share) * covariance + share * trace / width * np.eye(width)


def _blended(task: Moments, pool: Moments) -> Exact:
    own = task.count / (task.count + PRIOR * task.width)
    return own * task.covariance + (1.0 - own) * pool.covariance
