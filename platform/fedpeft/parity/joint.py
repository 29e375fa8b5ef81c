"""The central arm as one job of `fedpeft.central`: all tasks at once with DeepSpeed, from round 0's adapters, on the pooled rows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.config import describe
from fedpeft.errors import FedpeftError, kind_of
from fedpeft.files import write_atomic
from fedpeft.parity import copies
from fedpeft.parity.plan import Plan
from fedpeft.tasks.images import written

if TYPE_CHECKING:
    from fedpeft.training import TrainSettings

JOB = "central.job"
"""The job's TOML in the folder of a run: not called .toml, since those beside the federation's file are sites'."""
OWN = {"steps", "batch_size", "accumulate", "save_every"}
"""Training settings that tasks of one job may differ in: the law of equal examples takes care of them."""


def cannot(plan: Plan) -> str | None:
    """Why the tasks of ``plan`` cannot be one job here; None when they can."""
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed (pip install 'fedpeft[central]')"
    heads = {name: task.head.kind for name, task in plan.tasks.items()}
    if len(set(heads.values())) > 1:
        return f"tasks need heads of different kinds ({heads})"
    first, *others = (asdict(plan.settings(name)) for name in plan.tasks)
    differ = sorted(key for key, value in first.items() if key not in OWN and any(other[key] != value for other in others))
    if differ:
        return f"tasks have their own training settings ({', '.join(differ)})"
    return None


def settings(plan: Plan) -> TrainSettings:
    """How the job trains: together as many examples as the federation sees, to within one step.

    One step has a federated step of every task, in micro-batches no larger than a site's, so that it needs no more memory.
    """
    tasks = [plan.settings(name) for name in plan.tasks]
    size = max(one.batch_size for one in tasks)
    accumulate = -(-sum(one.batch_size * one.accumulate for one in tasks) // size)
    steps = max(1, round(sum(map(plan.examples, plan.tasks)) / (size * accumulate)))
    return replace(tasks[0], steps=steps, batch_size=size, accumulate=accumulate)


def examples(plan: Plan) -> int:
    """Examples that the job sees."""
    found = settings(plan)
    return found.steps * found.batch_size * found.accumulate


def table(plan: Plan, folder: Path) -> dict[str, Any]:
    """The job's TOML as a table; pooled rows are written where it says. Raises `DataError` or `StorageError`."""
    return {
        "name": f"{plan.outline.name}-central",
        "seed": plan.outline.seed,
        "output": "central",
        "registry": "central/registry",
        "base": copies.describe(plan.base),
        "method": describe(plan.method),
        "training": asdict(settings(plan)),
        "mixing": {"kind": "explicit", "weights": {name: float(plan.examples(name)) for name in plan.tasks}},
        "tasks": {name: {**describe(task), "data": {"path": str(pool(plan, name, folder))}} for name, task in plan.tasks.items()},
    }


def pool(plan: Plan, name: str, folder: Path) -> Path:
    """All sites' rows of one task as JSON Lines under ``folder``, with their splits. Raises `DataError` or `StorageError`."""
    lines = [json.dumps({**row, "split": split}, default=written) for split in ("train", "test") for row in plan.rows(name, split)]
    path = (folder / "pool" / f"{name}.jsonl").resolve()
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def train(plan: Plan, folder: Path) -> dict[str, float]:
    """Run the job in a process of its own, from the start or from its checkpoint: task -> score on everybody's held-out rows.

    Raises:
        FedpeftError: what ended the job, under its exit code; it has said why.
    """
    from fedpeft.central import launch
    from fedpeft.registry import Registry

    copies.write_toml(folder / JOB, table(plan, folder))
    digests = starts(plan, folder / "central" / "registry")
    before = [part for digest in digests.values() for part in ("--from", f"sha256:{digest}")]
    code = launch.supervise(launch.here(1), [str(folder / JOB), *before])
    if code:
        raise (kind_of(code) or FedpeftError)(f"the central job ended with exit code {code}, see above; --engine local trains without it")
    registry = Registry(folder / "central" / "registry")
    return {name: registry.get(name).manifest.metrics.get(task.headline, nan) for name, task in plan.tasks.items()}


def starts(plan: Plan, place: Path) -> dict[str, str]:
    """Publish round 0's adapters in the registry at ``place``, once: task -> digest of the version. Raises `StorageError`."""
    from fedpeft.bases import load_base, meta_base
    from fedpeft.parity.fitting import begin
    from fedpeft.registry import Manifest, Registry

    registry = Registry(place)
    base = load_base(plan.base) if plan.method.needs_weights else meta_base(plan.base)
    manifest = Manifest(scheme="start", federation=plan.outline.name)
    return {name: registry.publish(begin(plan, base, name), manifest, origin=f"start/{name}").digest for name in plan.tasks}
