"""Every router on every test row, and on requests of no task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from tests.bench.routing import measure
from tests.bench.routing.measure import Losses
from tests.bench.routing.world import TASKS, World, modules

from fedpeft.merging import make_rule, merge
from fedpeft.routing import Request, Route, make_router
from fedpeft.routing.policies import token_router

TRADED: dict[str, dict[str, Any]] = {"mahalanobis, never": {"quantile": None}, "mahalanobis, 5 %": {"quantile": 0.05}}
"""The router by second moments that never sends a text to the base, or more of a task's own ones."""
WHOLE = ("centroid", "centroid3", "mahalanobis", *TRADED, "cluster", "chain")
TOKENS = ("gate", "arrow", "spectr")
KINDS, ABSTAIN = (*WHOLE, *TOKENS), ("centroid", "mahalanobis", *TRADED, "cluster", "gate", "arrow", "chain")
Routes = dict[str, list[Route]]
"""By task, one for each test row."""


@dataclass
class Table:
    """Nats per token by way and task, and how often a way's first choice was the own adapter."""

    means: dict[str, dict[str, float]] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)

    def add(self, way: str, losses: dict[str, Losses], routes: Routes | None = None) -> None:
        """Enter one way."""
        self.means[way] = {name: float(found[:, 0].sum() / found[:, 1].sum()) for name, found in losses.items()}
        if routes is not None:
            self.right[way] = float(np.mean([route.task == name for name, mine in routes.items() for route in mine]))

    def recovered(self, way: str, name: str) -> float:
        """1 is as good as the own adapter, 0 as the base."""
        base, own = self.means["base"][name], self.means["oracle"][name]
        return (base - self.means[way][name]) / (base - own)


def compare(world: World) -> tuple[Table, dict[str, list[Route]]]:
    """All ways to answer the test rows; and where each router sent them."""
    table, alone = Table(), {name: measure.singly(world, world.adapters[name]) for name in TASKS}
    base = measure.singly(world, None)
    for name, losses in alone.items():
        table.add(name, losses)
    table.add("base", base)
    table.add("oracle", {name: alone[name][name] for name in TASKS})
    for way, rule, each in (("uniform mean", "cat", 1 / len(TASKS)), ("ties", "ties", 1.0)):
        merged = merge(list(world.adapters.values()), [each] * len(TASKS), make_rule(rule))
        table.add(way, measure.singly(world, merged))
    found = {name: routed(world, [row["prompt"] for row in rows]) for name, rows in world.test.items()}
    routes = {kind: {name: mine[kind] for name, mine in found.items()} for kind in KINDS}
    tokens = {kind: measure.by_tokens(world, token_router(kind, world.cards)) for kind in TOKENS}
    for kind in TOKENS:
        table.add(kind, tokens[kind], routes[kind])
    for kind in WHOLE:
        mixed = measure.by_weights(world, lambda name, place, kind=kind: [routes[kind][name][place].weights.get(e, 0.0) for e in TASKS])
        table.add(kind, {name: _chosen(routes[kind][name], mixed[name], tokens, name) for name in TASKS}, routes[kind])
    table.add("few-shot weights", few_shot(world))
    return table, {kind: [route for mine in routes[kind].values() for route in mine] for kind in KINDS}


def few_shot(world: World) -> dict[str, Losses]:
    """Each task under the weights that its few rows gave."""
    fitted = measure.few_shot(world)
    return measure.by_weights(world, lambda name, _place: [fitted[name][e] for e in TASKS])


def routed(world: World, texts: list[str]) -> dict[str, list[Route]]:
    """Where each router sends each of ``texts``; a request's hidden states are kept for no longer than it is routed."""
    routers, read = {kind: make_router(kind, world.cards) for kind in KINDS if kind not in TRADED}, modules(world)
    routers |= {name: replace(routers["mahalanobis"], **changes) for name, changes in TRADED.items()}  # type: ignore[type-var]
    found: dict[str, list[Route]] = {kind: [] for kind in KINDS}
    for text, vector in zip(texts, world.encoder.embed(texts), strict=True):
        request = Request(None, partial(np.asarray, vector), partial(world.base.watch, text, read), world.encoder.encoder, text)
        for kind, router in routers.items():
            found[kind].append(router.route(request))
    return found


def to_the_base(world: World, own: dict[str, list[Route]]) -> dict[str, dict[str, float]]:
    """Of every set the share that each router sends to the base: the tasks' own test rows together, then sets of no task."""
    sets = {"own tasks": own} | {name: routed(world, texts) for name, texts in world.strangers.items()}
    return {kind: {name: float(np.mean([route.task is None for route in found[kind]])) for name, found in sets.items()} for kind in ABSTAIN}


def _chosen(routes: list[Route], mixed: Losses, tokens: dict[str, dict[str, Losses]], name: str) -> Losses:
    """A row's losses under its mixture, or under the token router that a chain ended at."""
    return np.stack([tokens[r.router][name][place] if r.level == "token" else mixed[place] for place, r in enumerate(routes)])
