"""Routers that weigh whole requests: by the task's name, by centroid, by cluster, and by weights fitted before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import exp
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import AdapterError
from fedpeft.routing import closeness
from fedpeft.routing.cards import Card, calibrate, common_encoder
from fedpeft.routing.moments import Measure
from fedpeft.routing.ngrams import spelled
from fedpeft.routing.requests import Request, Route

Top = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class TaskRouter:
    """The caller names the task; a request without a name is nobody's."""

    tasks: tuple[str, ...]
    kind: ClassVar[str] = "task"

    def route(self, request: Request) -> Route:
        """All weight on the named task. Raises `AdapterError` when no such task is served."""
        if request.task is None:
            return Route({}, 0.0, router=self.kind, why="the request names no task")
        if request.task not in self.tasks:
            raise AdapterError(f"task {request.task!r} is not served here; tasks are {sorted(self.tasks)}")
        scores = {task: float(task == request.task) for task in self.tasks}
        return Route({request.task: 1.0}, 1.0, scores, self.kind, "the request names it")


@dataclass(frozen=True)
class CentroidRouter:
    """The ``top`` tasks with the nearest centroids, among those whose own threshold the request reaches; else none (ALGORITHMS B2).

    Centroids are compared at unit length, so that no task wins by a long one. Weights are the softmax of cosines over
    ``temperature`` (LORAUTER, arXiv 2601.21795; LoraRetriever, 2402.09997); all weight on the nearest with ``top = 1``.
    """

    cards: Mapping[str, Card]
    top: Top = 1
    temperature: Temperature = 0.1
    kind: ClassVar[str] = "centroid"

    def route(self, request: Request) -> Route:
        """By the request's embedding. Raises `AdapterError` for one of another size or encoder than the cards'."""
        common_encoder(self.cards, request.encoder)
        return self.route_all(np.asarray(request.vector)[None])[0]

    def route_all(self, requests: NDArray[np.floating[Any]]) -> Sequence[Route]:
        """One route per row of ``requests`` (N, D), embeddings of any length above 0."""
        if not self.cards:
            return [Route({}, -1.0, router=self.kind, why="no task has a card") for _ in requests]
        return [self._choose(dict(zip(sorted(self.cards), scores, strict=True))) for scores in cosines(self._matrix, requests).tolist()]

    def _choose(self, scores: dict[str, float]) -> Route:
        near = [name for name, score in scores.items() if score >= self.cards[name].threshold]
        best = max(near or scores, key=lambda name: scores[name])
        if not near:
            least = f"cosine {scores[best]:.3f} to the nearest, {best!r}, is below its threshold {self.cards[best].threshold:.3f}"
            return Route({}, scores[best], scores, self.kind, least)
        kept = sorted(near, key=lambda name: -scores[name])[: self.top]
        why = ", ".join(f"cosine {scores[name]:.3f} >= {self.cards[name].threshold:.3f} to {name!r}" for name in kept)
        return Route(softmax({name: scores[name] / self.temperature for name in kept}), scores[best], scores, self.kind, why)

    @cached_property
    def _matrix(self) -> NDArray[np.float64]:
        return matrix(self.cards)


@dataclass(frozen=True)
class MahalanobisRouter:
    """The task whose Gaussian and n-grams make the request most likely, unless it is not near even to that one; else none.

    Weights are the ``top`` tasks' posteriors, the softmax of log-densities over ``temperature``: dimensions of an embedding are not as
    independent as a Gaussian takes them, and 4 made the posteriors of held-out training texts honest (tests/bench/routing). The request
    abstains below the closeness that all but a share ``quantile`` of the likeliest task's own texts reach, by ``texted`` where the
    request's text is there and all tasks have n-grams (`closeness.read`), else by ``counts``. Without a quantile it never abstains, nor
    without counts.
    """

    cards: Mapping[str, Card]
    moments: Mapping[str, Measure]
    counts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    texted: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    quantile: Share | None = 0.02
    top: Top = 3
    temperature: Temperature = 4.0
    kind: ClassVar[str] = "mahalanobis"

    def route(self, request: Request) -> Route:
        """By the request's embedding and text. Raises `AdapterError` for an embedding of another size or encoder than the cards'."""
        common_encoder(self.cards, request.encoder)
        return self.route_all(np.asarray(request.vector)[None], None if request.text is None else [request.text])[0]

    def route_all(self, requests: NDArray[np.floating[Any]], texts: Sequence[str] | None = None) -> Sequence[Route]:
        """One route per row of ``requests`` (N, D), embeddings of length 1 of ``texts``. Raises `AdapterError` for another D."""
        if not self.moments:
            return [Route({}, -1.0, router=self.kind, why="no task has moments") for _ in requests]
        names, known = sorted(self.moments), texts if self._spelled else None
        likely, close = closeness.read(tuple(self.moments[name] for name in names), requests, known)
        leasts = self._leasts(self.counts if known is None else self.texted)
        pairs = zip(likely.tolist(), close.tolist(), strict=True)
        return [self._choose(dict(zip(names, one, strict=True)), dict(zip(names, other, strict=True)), leasts) for one, other in pairs]

    def _choose(self, likely: dict[str, float], close: dict[str, float], leasts: Mapping[str, float]) -> Route:
        order = sorted(likely, key=lambda name: (-likely[name], name))
        best, least = order[0], leasts.get(order[0], -np.inf)
        told = f"closeness {close[best]:.3f} to the likeliest, {best!r}, "
        if close[best] < least:
            return Route({}, close[best], close, self.kind, f"{told}is below its threshold {least:.3f}")
        shares = softmax({name: likely[name] / self.temperature for name in order[: self.top]})
        return Route(shares, close[best], close, self.kind, f"{told}>= {least:.3f}")

    @cached_property
    def _spelled(self) -> bool:
        return set(self.texted) >= set(self.moments) and all(map(spelled, self.moments.values()))

    def _leasts(self, counts: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
        return {} if self.quantile is None else {name: calibrate(mine, self.quantile) for name, mine in counts.items()}


@dataclass(frozen=True)
class ClusterRouter:
    """Equal weights over the cluster that the request is in (MBC-mu, Ostapenko et al. 2024, arXiv 2405.11157; ALGORITHMS B1).

    The cluster is that of the nearest task among those whose looser threshold, the ``quantile`` of their own texts' cosines, is
    reached; for a card without counts, its threshold. Tasks in none of ``clusters`` make one of their own together.
    """

    cards: Mapping[str, Card]
    clusters: tuple[tuple[str, ...], ...] = ()
    quantile: Share = 0.01
    kind: ClassVar[str] = "cluster"

    def route(self, request: Request) -> Route:
        """By the request's embedding. Raises `AdapterError` for one of another size or encoder than the cards'."""
        common_encoder(self.cards, request.encoder)
        if not self.cards:
            return Route({}, -1.0, router=self.kind, why="no task has a card")
        (row,) = cosines(matrix(self.cards), np.asarray(request.vector)[None]).tolist()
        scores = dict(zip(sorted(self.cards), row, strict=True))
        near = [name for name, score in scores.items() if score >= self.cards[name].loosened(self.quantile)]
        best = max(near or scores, key=lambda name: scores[name])
        if not near:
            least = f"cosine {scores[best]:.3f} to the nearest, {best!r}, is below {self.cards[best].loosened(self.quantile):.3f}"
            return Route({}, scores[best], scores, self.kind, least)
        members = self._members(best)
        why = f"in the cluster of {best!r}: the mean of {len(members)}"
        return Route(dict.fromkeys(members, 1.0 / len(members)), scores[best], scores, self.kind, why)

    def _members(self, name: str) -> list[str]:
        named = {task for cluster in self.clusters for task in cluster}
        groups = [*self.clusters, tuple(sorted(set(self.cards) - named))]
        return next(sorted(set(group) & set(self.cards)) for group in groups if name in group)


@dataclass(frozen=True)
class MeanRouter:
    """Equal weights over all adapters, whatever the request: the uniform mean."""

    tasks: tuple[str, ...]
    kind: ClassVar[str] = "mean"

    def route(self, request: Request) -> Route:
        """The same for every request."""
        each = dict.fromkeys(self.tasks, 1.0 / max(len(self.tasks), 1))
        return Route(each, 1.0, each, self.kind, f"the mean of {len(each)}")


@dataclass(frozen=True)
class FixedRouter:
    """Weights that were fitted before on a few rows (`fewshot.fit`): every request gets them."""

    mixture: Mapping[str, float]
    kind: ClassVar[str] = "fewshot"
    source: str = field(default="weights fitted on a few rows", compare=False)

    def route(self, request: Request) -> Route:
        """The same for every request; adapters of weight 0 are left out."""
        kept = {name: weight for name, weight in self.mixture.items() if weight != 0.0}
        return Route(kept, max(kept.values(), default=0.0), dict(self.mixture), self.kind, self.source)


def matrix(cards: Mapping[str, Card]) -> NDArray[np.float64]:
    """The unit-norm centroids (E, D), by name. Raises `AdapterError` when their sizes differ."""
    sizes = {name: len(card.centroid) for name, card in sorted(cards.items())}
    if len(set(sizes.values())) > 1:
        raise AdapterError(f"router: cards differ in their number of values {sizes}; they were made by different bases")
    found: NDArray[np.float64] = np.array([cards[name].centroid for name in sizes], np.float64)
    norms: NDArray[np.float64] = np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found / norms


def cosines(centroids: NDArray[np.float64], requests: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Cosines (N, E) of ``requests`` (N, D) to unit-norm ``centroids`` (E, D). Raises `AdapterError` on another D."""
    rows = np.asarray(requests, np.float64)
    if rows.shape[1:] != centroids.shape[1:]:
        raise AdapterError(
            f"router: an embedding has {rows.shape[-1]} values, the cards have {centroids.shape[1]}; they were made by another base"
        )
    norms: NDArray[np.float64] = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found: NDArray[np.float64] = rows / norms @ centroids.T
    return found


def softmax(logits: Mapping[str, float]) -> dict[str, float]:
    """Shares that add up to 1."""
    peak = max(logits.values())
    shares = {name: exp(value - peak) for name, value in logits.items()}
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}
