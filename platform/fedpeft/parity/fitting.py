"""Adapters trained without rounds: on one site's rows, or on everybody's, by the one loop; and scored on everybody's held-out rows.

Each begins from round 0's values of the federation, and sees as many examples as it does (`Plan.steps`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.files import write_atomic

if TYPE_CHECKING:
    from fedpeft.adapters import Adapter
    from fedpeft.bases import Base
    from fedpeft.parity.plan import Plan

Say = Callable[[str], None]


def local(plan: Plan, base: Base, folder: Path, say: Say) -> dict[str, dict[str, float]]:
    """Task -> site -> score of an adapter trained on that site's rows alone; what lies in ``folder`` is not trained again."""
    scores: dict[str, dict[str, float]] = {name: {} for name in plan.tasks}
    for name, site in plan.pairs():
        say(f"{site} alone: {name}")
        scores[name][site] = kept(folder / f"{name}-{site}", lambda work, name=name, site=site: fit(plan, base, name, site, work))  # type: ignore[misc]
    return scores


def pooled(plan: Plan, base: Base, folder: Path, say: Say) -> dict[str, float]:
    """Task -> score of an adapter trained on all sites' rows together; what lies in ``folder`` is not trained again."""
    scores = {}
    for name in plan.tasks:
        say(f"pooled: {name}")
        scores[name] = kept(folder / name, lambda work, name=name: fit(plan, base, name, None, work))  # type: ignore[misc]
    return scores


def kept(place: Path, work: Callable[[Path], float]) -> float:
    """What ``work(place)`` answers, from the file beside ``place`` where it was answered before. Raises `StorageError`."""
    path = place.with_name(f"{place.name}.json")
    if path.exists():
        return float(json.loads(path.read_text(encoding="utf-8")))
    answer = work(place)
    write_atomic(path, json.dumps(answer).encode())
    return answer


def fit(plan: Plan, base: Base, name: str, site: str | None, checkpoint: Path) -> float:
    """Train one adapter on the rows of ``site`` (None: of all), going on from ``checkpoint``, and score it.

    Raises:
        DataError: rows are missing or unreadable.
        UpdateError: a loss is not finite.
        StorageError: the checkpoint cannot be written.
    """
    from fedpeft.adapters import attach
    from fedpeft.training import TrainJob, train
    from fedpeft.training.checkpoint import clear

    task, start = plan.tasks[name], begin(plan, base, name)
    data = task.encode(plan.rows(name, "train", site), base)
    settings = replace(plan.settings(name), steps=plan.steps(name, site))
    with attach(base, start.spec) as live:
        live.load(start.tensors)
        train(live, task, data, settings, TrainJob(start.spec.layout.roles, plan.outline.start_seed(name), checkpoint))
        score = _scored(plan, base, name, live)
    clear(checkpoint)
    return score


def begin(plan: Plan, base: Base, name: str) -> Adapter:
    """The adapter of task ``name`` as round 0 of the federation has it."""
    from fedpeft.adapters import initial, make_spec

    spec = make_spec(name, base, plan.method, plan.tasks[name].head)
    return initial(base, spec, plan.outline.start_seed(name))


def score(plan: Plan, base: Base, adapter: Adapter) -> float:
    """The headline metric of ``adapter`` on everybody's held-out rows of its task."""
    from fedpeft.adapters import attach

    with attach(base, adapter.spec) as live:
        live.load(adapter.tensors)
        return _scored(plan, base, adapter.spec.task, live)


def _scored(plan: Plan, base: Base, name: str, live: Any) -> float:
    from fedpeft.training import evaluate

    task = plan.tasks[name]
    return float(task.scores(evaluate(live, task, task.encode(plan.rows(name, "test"), base)))[task.headline])
