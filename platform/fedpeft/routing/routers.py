"""From a request to the task whose adapter answers it, or to nobody: then the base answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.routing.cards import Card


@dataclass(frozen=True)
class Route:
    """Where a request goes: a task, or None for the base alone; its score, and the scores of all tasks."""

    task: str | None
    score: float
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRouter:
    """The caller names the task."""

    tasks: tuple[str, ...]
    kind: ClassVar[str] = "task"

    def route(self, request: str) -> Route:
        """``request`` is a task's name. Raises `AdapterError` when no such task is served."""
        if request not in self.tasks:
            raise AdapterError(f"task {request!r} is not served here; tasks are {sorted(self.tasks)}")
        return Route(request, 1.0, {task: float(task == request) for task in self.tasks})


@dataclass(frozen=True)
class CentroidRouter:
    """The task with the nearest centroid, among those whose own threshold the request reaches; else none (ALGORITHMS B2)."""

    cards: Mapping[str, Card]
    kind: ClassVar[str] = "centroid"

    def route(self, request: NDArray[np.floating[Any]]) -> Route:
        """``request`` is an embedding (D,) of any length above 0. Raises `AdapterError` on another D than the cards'."""
        return self.route_all(np.asarray(request)[None])[0]

    def route_all(self, requests: NDArray[np.floating[Any]]) -> Sequence[Route]:
        """One route per row of ``requests`` (N, D)."""
        names, rows = sorted(self.cards), np.asarray(requests, np.float64)
        if not names:
            return [Route(None, -1.0) for _ in rows]
        if rows.shape[1:] != self._matrix.shape[1:]:
            raise AdapterError(
                f"router: an embedding has {rows.shape[-1]} values, the cards have {self._matrix.shape[1]}; they were made by another base"
            )
        norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return [self._choose(dict(zip(names, scores, strict=True))) for scores in (rows / norms @ self._matrix.T).tolist()]

    def _choose(self, scores: dict[str, float]) -> Route:
        near = [name for name, score in scores.items() if score >= self.cards[name].threshold]
        best = max(near or scores, key=lambda name: scores[name])
        return Route(best if near else None, scores[best], scores)

    @cached_property
    def _matrix(self) -> NDArray[np.float64]:
        sizes = {name: len(card.centroid) for name, card in sorted(self.cards.items())}
        if len(set(sizes.values())) > 1:
            raise AdapterError(f"router: cards differ in their number of values {sizes}; they were made by different bases")
        matrix: NDArray[np.float64] = np.array([self.cards[name].centroid for name in sizes], np.float64)
        norms: NDArray[np.float64] = np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
        return matrix / norms
