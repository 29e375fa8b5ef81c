"""Which cluster of an undeclared task this site takes: the one whose adapter loses least on its training rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedpeft.schemes import ifca
from fedpeft.tensors import Tensors
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskResult
from fedpeft_client import answers, plan, policy, rounds
from fedpeft_client.answers import Answer
from fedpeft_client.beginning import MissingVersion
from fedpeft_client.config import SiteConfig
from fedpeft_client.faults import failure
from fedpeft_client.plan import Work
from fedpeft_client.policy import Ask
from fedpeft_client.rounds import Bench

if TYPE_CHECKING:
    from fedpeft.bases import Base
    from fedpeft.tasks import Encoded

ROWS = 256
"""Rows that losses are compared on, evenly spread, since a choice needs no more."""


def answers_to(asked: RoundPlan, site: SiteConfig, starts: Callable[[Work], Tensors], bench: Bench) -> list[Answer]:
    """An answer for each plan of ``asked``; whatever goes wrong is a named failure, and then the site takes no cluster."""
    try:
        works = [plan.read(asked, task) for task in asked.tasks]
        for work in works:
            policy.check(ask(work, bench.base, site), site)
            rounds.check_base(work, bench.base)
        return answer(works, starts, bench, site.name)
    except Exception as fault:  # noqa: BLE001 - the edge between messages: a fault must not take the worker down
        return [failure(task.task, fault) for task in asked.tasks]


def ask(work: Work, base: Base, site: SiteConfig) -> Ask:
    """What the site's policy must judge: nothing but a choice leaves: there is no sum to mask, and no noise to account for."""
    return replace(plan.ask(work, base.fingerprint.identity, site), secure_aggregation=True, upload_bytes=0, steps=0, accounted=False)


def answer(works: Sequence[Work], starts: Callable[[Work], Tensors], bench: Bench, site: str) -> list[Answer]:
    """One answer for each of ``works``, in their order: of the clusters of one set of rows, the chosen one is done and the others refused.

    Where an adapter is missing here, all of its alternatives are asked for again, whole.
    """
    groups: dict[str, list[Work]] = {}
    for work in works:
        groups.setdefault(work.task.name, []).append(work)
    given = {one.result.task: one for group in groups.values() for one in _group(group, starts, bench, site)}
    return [given[work.plan.task] for work in works]


def _group(group: list[Work], starts: Callable[[Work], Tensors], bench: Bench, site: str) -> list[Answer]:
    try:
        tensors = {work.plan.task: starts(work) for work in group}
    except MissingVersion as fault:
        return [answers.without(work.plan.task, TaskResult.STATUS_MISSING_VERSION, str(fault)) for work in group]
    data = {table: _some(work, bench) for table, work in {work.plan.task_json: work for work in group}.items()}
    losses = {work.plan.task: _loss(work, tensors[work.plan.task], data[work.plan.task_json], bench.base) for work in group}
    chosen = ifca.choose(losses, site)
    return [_said(work, chosen) for work in group]


def _said(work: Work, chosen: str) -> Answer:
    if work.plan.task == chosen:
        return answers.of_counters(chosen, {}, 0.0, work.plan.adapter_digest)
    return answers.without(work.plan.task, TaskResult.STATUS_REFUSED, "another cluster fits this site's rows better")


def _loss(work: Work, start: Tensors, data: Encoded, base: Base) -> float:
    """Mean loss of ``data`` under ``start``."""
    from fedpeft.adapters import attach
    from fedpeft.training import evaluate

    with attach(base, work.spec) as live:
        live.load(start)
        counters = evaluate(live, work.task, data)
    return float(counters["loss"][0]) / max(float(counters["count"][0]), 1.0)


def _some(work: Work, bench: Bench) -> Encoded:
    rows = bench.shelf.rows(work.task.name, "train")
    return work.task.encode(rows[:: -(-len(rows) // ROWS)], bench.base)
