"""Mixture weights from a few rows: at most 20 scalars, fitted at the site that holds the rows, by forward passes alone or by gradient.

LoraHub (Huang et al. 2023, arXiv 2307.13269) finds weights by a gradient-free search with an L1 penalty; here it is CMA-ES (Hansen 2016,
arXiv 1604.00772). Unlike LoraHub's (sum w A)(sum w B), whose cross terms are no mixture, the weights multiply whole products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import AdapterError
from fedpeft.routing.routers import FixedRouter

MOST = 20
"""Scalars that a few rows can tell apart; preselect by centroid where there are more adapters."""
Weights = NDArray[np.float64]
Loss = Callable[[Weights], float]
"""Mean loss of the rows under weights (E,)."""
Slope = Callable[[Weights], tuple[float, Weights]]
"""Loss and its gradient (E,)."""


@dataclass(frozen=True)
class FewShot:
    """How weights are fitted: ``evaluations`` of the loss at most, an ``l1`` penalty on their mean size, all within [-bound, bound].

    The search starts at equal weights that add up to 1, of which the answer is never worse on the rows.
    """

    evaluations: Annotated[int, Field(ge=1)] = 120
    l1: Annotated[float, Field(ge=0.0)] = 0.05
    bound: Annotated[float, Field(gt=0.0)] = 1.5
    step: Annotated[float, Field(gt=0.0)] = 0.3
    seed: int = 0
    how: Literal["search", "gradient"] = "search"

    def fit(self, names: Sequence[str], loss: Loss, slope: Slope | None = None) -> FixedRouter:
        """Weights of ``names`` that make ``loss`` small; ``slope`` is needed where ``how`` is gradient.

        Raises:
            AdapterError: no name, or more than `MOST`; no slope for a fit by gradient; or the loss is finite nowhere.
        """
        if not 1 <= len(names) <= MOST:
            raise AdapterError(f"few-shot weights: {len(names)} adapters; 1 to {MOST} can be fitted, choose the nearest by centroid first")
        if self.how == "gradient" and slope is None:
            raise AdapterError("few-shot weights: a fit by gradient needs the loss's gradient; use how = 'search'")
        start = np.full(len(names), 1.0 / len(names))
        found, value = self._descend(start, slope) if self.how == "gradient" and slope else self._search(start, loss)
        if not np.isfinite(value):
            raise AdapterError("few-shot weights: the loss is finite for no mixture; look at the rows and at the adapters")
        return FixedRouter(dict(zip(names, found.tolist(), strict=True)), source=f"weights fitted by {self.how}, loss {value:.4g}")

    def penalty(self, weights: Weights) -> float:
        """``l1`` times the mean size of the weights (LoraHub, eq. 2)."""
        return self.l1 * float(np.abs(weights).mean())

    def _search(self, start: Weights, loss: Loss) -> tuple[Weights, float]:
        """The best point seen by CMA-ES from ``start``, and its penalised loss."""
        evolution, best = Evolution.at(start, self.step, self.seed), (start, loss(start) + self.penalty(start))
        left = self.evaluations - 1
        while left > 0:
            points = np.clip(evolution.ask()[:left], -self.bound, self.bound)
            values = [_finite(loss(point) + self.penalty(point)) for point in points]
            left -= len(points)
            first = int(np.argmin(values))
            best = (points[first], values[first]) if values[first] < best[1] or not np.isfinite(best[1]) else best
            evolution.tell(points, values)
        return best

    def _descend(self, start: Weights, slope: Slope) -> tuple[Weights, float]:
        """The best point seen by Adam with a tenth of ``step``, and its penalised loss."""
        best, point, mean, square = (start, np.inf), start.copy(), np.zeros_like(start), np.zeros_like(start)
        for number in range(1, self.evaluations + 1):
            value, gradient = slope(point)
            if (total := _finite(value + self.penalty(point))) < best[1]:
                best = point.copy(), total
            gradient = gradient + self.l1 * np.sign(point) / len(point)
            mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
            rate = 0.1 * self.step / (np.sqrt(square / (1 - 0.99**number)) + 1e-12)
            point = np.clip(point - rate * mean / (1 - 0.9**number), -self.bound, self.bound)
        return best


@dataclass
class Evolution:
    """CMA-ES with its standard constants (Hansen 2016, table 1) for E dimensions and 4 + 3 ln E points a generation."""

    mean: Weights
    sigma: float
    covariance: Weights
    rng: np.random.Generator
    paths: tuple[Weights, Weights]

    @staticmethod
    def at(start: Weights, sigma: float, seed: int) -> Evolution:
        """A search around ``start``."""
        zero = np.zeros_like(start)
        return Evolution(start.copy(), sigma, np.eye(len(start)), np.random.default_rng(seed), (zero, zero.copy()))

    def ask(self) -> Weights:
        """A generation of points (P, E)."""
        size = len(self.mean)
        sizes, axes = np.linalg.eigh(self.covariance)
        drawn = self.rng.standard_normal((4 + int(3 * np.log(size)), size))
        points: Weights = self.mean + self.sigma * (drawn * np.sqrt(np.maximum(sizes, 1e-20))) @ axes.T
        return points

    def tell(self, points: Weights, values: Sequence[float]) -> None:
        """Move towards the better half of ``points``."""
        size, kept = len(self.mean), max(len(points) // 2, 1)
        raw = np.log(kept + 0.5) - np.log(np.arange(1, kept + 1))
        shares, mass = raw / raw.sum(), float(raw.sum() ** 2 / (raw**2).sum())
        steps = (points[np.argsort(values)[:kept]] - self.mean) / self.sigma
        move = shares @ steps
        self.mean = self.mean + self.sigma * move
        damp, reach = (mass + 2) / (size + mass + 5), np.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
        sizes, axes = np.linalg.eigh(self.covariance)
        white = axes @ ((axes.T @ move) / np.sqrt(np.maximum(sizes, 1e-20)))
        slow = (4 + mass / size) / (size + 4 + 2 * mass / size)
        one = 2 / ((size + 1.3) ** 2 + mass)
        many = min(1 - one, 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass))
        path = (1 - damp) * self.paths[0] + np.sqrt(damp * (2 - damp) * mass) * white
        trail = (1 - slow) * self.paths[1] + np.sqrt(slow * (2 - slow) * mass) * move
        self.paths = path, trail
        spread = (steps.T * shares) @ steps
        self.covariance = (1 - one - many) * self.covariance + one * np.outer(trail, trail) + many * spread
        self.sigma *= float(np.exp(min(1.0, damp / (1 + damp) * (np.linalg.norm(path) / reach - 1))))


def nearest(scores: Mapping[str, float], most: int = MOST) -> tuple[str, ...]:
    """The adapters of the ``most`` best scores, best first: what few-shot weights are fitted over where there are more."""
    return tuple(sorted(scores, key=lambda name: (-scores[name], name))[:most])


def _finite(value: float) -> float:
    return value if np.isfinite(value) else float("inf")
