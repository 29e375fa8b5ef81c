"""What a comparison came to, from the files of its folder: plain values, ready for JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpeft.errors import StorageError
from fedpeft.parity import joint, meter
from fedpeft.parity.plan import Plan
from fedpeft.parity.said import ARMS

FLOAT_BYTES = 4


def cost_path(folder: Path, arm: str) -> Path:
    """Where an arm's seconds and memory are measured into."""
    return folder / f"{arm}.cost.json"


def collect(plan: Plan, folder: Path) -> dict[str, Any]:
    """The figures of the run in ``folder``, by arm. Raises `StorageError` when an arm's file is missing or torn."""
    answers = {arm: _answer(folder, arm) for arm in ARMS}
    by_site = answers["local"]["scores"]
    scores = {
        "local": {task: fmean(by_site[task].values()) for task in plan.tasks},
        "federated": answers["federated"]["scores"],
        "central": answers["central"]["scores"],
    }
    costs = {arm: meter.read(cost_path(folder, arm)) for arm in ARMS}
    return {
        "federation": plan.outline.name,
        "sites": list(plan.sites),
        "rounds": plan.outline.rounds,
        "metrics": {name: task.headline for name, task in plan.tasks.items()},
        "scores": scores,
        "mean": means({name: task.headline for name, task in plan.tasks.items()}, scores),
        "local_by_site": by_site,
        "examples": examples(plan, answers["central"]["engine"]),
        **_bytes(plan, folder, answers["federated"]["bytes"]),
        "seconds": {arm: cost.seconds for arm, cost in costs.items()},
        "peak_bytes": {arm: cost.peak_bytes for arm, cost in costs.items()},
        "engine": answers["central"]["engine"],
        "scored_by": answers["federated"]["scored_by"],
        "dropped": answers["federated"]["dropped"],
    }


def means(metrics: Mapping[str, str], scores: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    """Mean score over the tasks by arm; None where tasks have different metrics, whose mean says nothing."""
    if len(set(metrics.values())) > 1:
        return None
    return {arm: fmean(found.values()) for arm, found in scores.items()}


def examples(plan: Plan, engine: str) -> dict[str, int]:
    """Examples that each arm sees in all, over all sites and tasks."""
    total = sum(map(plan.examples, plan.tasks))
    return {"local": total, "federated": total, "central": joint.examples(plan) if engine == "deepspeed" else total}


def _bytes(plan: Plan, folder: Path, federated: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Bytes that leave the sites and that reach them, by arm: for the central one all training rows, and all finished adapters."""
    from fedpeft.registry import Registry

    registry = Registry(folder / "coordinator" / "registry")
    rows = sum(len(json.dumps(row, default=str).encode()) + 1 for name in plan.tasks for row in plan.rows(name, "train"))
    adapters = sum(FLOAT_BYTES * registry.load(name).spec.layout.size * len(plan.holders(name)) for name in plan.tasks)
    return {
        "bytes_up": {"local": 0, "federated": federated["up"], "central": rows},
        "bytes_down": {"local": 0, "federated": federated["down"], "central": adapters},
    }


def _answer(folder: Path, arm: str) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / f"{arm}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as fault:
        raise StorageError(f"{folder / arm}.json: cannot be read ({fault}); remove it and run the same command again") from None
