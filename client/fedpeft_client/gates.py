"""Gates of the frozen adapter, trained on the site's rows, and how its routers score those rows: all of it leaves as weighted sums."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedpeft.errors import PolicyError
from fedpeft.routing import ArrowRouter, GateRouter, Request, RouterCard, counts_of, derive
from fedpeft.routing.requests import States
from fedpeft.routing.tokens import TokenRouter, over_tokens
from fedpeft.tensors import Tensors
from fedpeft.training import TrainJob
from fedpeft.update import Counters, snap_counters
from fedpeft_client import rounds
from fedpeft_client.plan import Work
from fedpeft_client.rounds import Bench, share

SCORED = 64
"""Training rows whose scores are counted, evenly spread."""


def evaluate(work: Work, start: Tensors, bench: Bench, base_alone: Callable[[], Counters]) -> tuple[Counters, float]:
    """What an evaluation plan wants, and the seconds it took: gates where it asks for them, else `rounds.evaluate`."""
    if not work.plan.HasField("gates"):
        return rounds.evaluate(work, start, bench, base_alone)
    began = time.monotonic()
    return train(work, start, bench), time.monotonic() - began


def train(work: Work, start: Tensors, bench: Bench) -> Counters:
    """``gate.<module>`` and ``gate.weight``, weighted by the site's share of rows; ``score.gate`` and ``score.arrow``, histograms.

    Raises:
        AdapterError: the adapter has no LoRA layers.
        DataError: the site has no training rows.
        PolicyError: the plan promises privacy, which gates have none of.
    """
    from fedpeft.adapters import attach
    from fedpeft.training.gates import train_gates

    if work.promise is not None:
        raise PolicyError(
            f"gates of task {work.plan.task!r}: the plan promises epsilon {work.promise.epsilon:g}, and gates are not accounted; the "
            "federation must set routing.gates = false (the routers arrow and spectr need none)"
        )
    task, asked = work.task, work.plan.gates
    data = bench.shelf.encoded(task, "train", bench.base)
    weight = share(len(bench.shelf.rows(task.name, "train")), work.plan.weight_cap)
    job = TrainJob(frozenset(), work.plan.seed, progress=lambda step, _loss: bench.progress(task.name, step))
    with attach(bench.base, work.spec) as live:
        live.load(start)
        gates = train_gates(live, task, data, replace(work.settings, steps=asked.steps, lr=asked.lr), job)
    weighted = {f"gate.{module}": tuple((weight * gate.astype(np.float64)).tolist()) for module, gate in gates.items()}
    return snap_counters({**weighted, "gate.weight": (weight,), **_scores(work, bench, derive(start, gates=gates))})


def _scores(work: Work, bench: Bench, card: RouterCard) -> Counters:
    routers: dict[str, TokenRouter] = {"gate": GateRouter({work.plan.task: card.gates})}
    if card.arrows:
        routers["arrow"] = ArrowRouter({work.plan.task: card.arrows})
    modules = sorted({*card.gates, *card.arrows})
    rows = bench.shelf.rows(work.plan.task, "train")
    texts = [work.task.text_of(row) for row in rows[:: -(-len(rows) // SCORED)]]
    found: dict[str, list[float]] = {kind: [] for kind in routers}
    for text in texts:
        states = bench.base.watch(text, modules)
        for kind, router in routers.items():
            found[kind].append(_score(router, states))
    return {f"score.{kind}": counts_of(np.array(scores)) for kind, scores in found.items()}


def _score(router: TokenRouter, states: States) -> float:
    return over_tokens(router, Request(watch=lambda: states)).score
