"""Policies: routers asked one after the other until one of them does not abstain, and what a router needs to be sure of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedpeft.errors import AdapterError
from fedpeft.routing.cards import Card, calibrate, counts_of
from fedpeft.routing.requests import Request, Route, Router
from fedpeft.routing.routers import ClusterRouter

BASE = "base"


@dataclass(frozen=True)
class Chain:
    """The first router of ``routers`` that does not abstain decides; when all do, the base answers (ALGORITHMS B2).

    The order of a service is task, centroid, then gate, arrow and cluster within reach of a centroid, then the base. A later router sees
    hidden states only when the earlier ones abstained, so a request that a centroid settles costs one embedding.
    """

    routers: tuple[Router, ...] = ()
    kind: ClassVar[str] = "chain"

    def route(self, request: Request) -> Route:
        """The deciding router's route, with what the others said before it. Raises `AdapterError` as they do."""
        said, scores, best = "", dict[str, float](), 0.0
        for router in self.routers:
            found = router.route(request)
            if found.weights:
                return found.after(said)
            said = "; ".join(filter(None, (said, f"{router.kind}: {found.why}")))
            scores, best = (dict(found.scores), found.score) if found.scores else (scores, best)
        return Route({}, best, scores, BASE, said)


@dataclass(frozen=True)
class Calibrated:
    """``router`` that abstains where its best score is below that adapter's threshold (`thresholds`); without one it never abstains."""

    router: Router
    least: Mapping[str, float] = field(default_factory=dict)
    kind: ClassVar[str] = "calibrated"

    def route(self, request: Request) -> Route:
        """The router's own route, or none."""
        found = self.router.route(request)
        chosen = found.task
        if chosen is None or found.scores.get(chosen, found.score) >= self.least.get(chosen, -np.inf):
            return found
        why = f"score {found.scores.get(chosen, found.score):.3f} of {chosen!r} is below its threshold {self.least[chosen]:.3f}"
        return Route({}, found.score, found.scores, found.router, why, found.level)


@dataclass(frozen=True)
class Within:
    """``router`` for requests that are near some task: a cosine to its centroid that all but ``quantile`` of its own texts reach.

    Gates and Arrow tell adapters apart and not what is out of scope (tests/bench/routing): a request of no task goes to the base before
    they are asked.
    """

    router: Router
    cards: Mapping[str, Card] = field(default_factory=dict)
    quantile: float = 0.01
    kind: ClassVar[str] = "within"

    def route(self, request: Request) -> Route:
        """The router's own route, or none. Raises `AdapterError` for an embedding of another size or encoder than the cards'."""
        found = ClusterRouter(self.cards, quantile=self.quantile).route(request)
        return self.router.route(request) if found.weights else Route({}, found.score, found.scores, self.kind, found.why)


def thresholds(router: Router, own: Mapping[str, Sequence[Request]], quantile: float = 0.05) -> dict[str, float]:
    """For each task the score that all but a share ``quantile`` of its own training requests reach; scores are cosines in [-1, 1].

    Counted in the bins of `cards.histogram`, so that sites can send the counts as sums and the coordinator gets the same.

    Raises:
        AdapterError: a task has no request, or the router gives it no score.
    """
    return {name: calibrate(counts_of(_scores(router, name, requests)), quantile) for name, requests in own.items()}


def _scores(router: Router, name: str, requests: Sequence[Request]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = [router.route(request).scores for request in requests]
    if not found or any(name not in scores for scores in found):
        raise AdapterError(f"router {router.kind}: no scores of task {name!r} to calibrate on; give requests of its training rows")
    return np.array([scores[name] for scores in found], np.float64)
