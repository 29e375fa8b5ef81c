"""What one arm does in a process of its own: loads the base, trains, scores, and writes its answer into the folder of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.errors import ConfigError
from fedpeft.files import write_atomic
from fedpeft.parity import fitting, joint
from fedpeft.parity.plan import Plan

Answer = dict[str, Any]


def work(folder: Path, arm: str, engine: str) -> None:
    """Do ``arm`` on the files of ``folder`` with ``engine`` and write ``ARM.json`` there.

    Raises:
        FedpeftError: what kept it from being done; what is finished of it is not done again.
    """
    if arm not in ARMS:
        raise ConfigError(f"arm {arm!r} is not known; choose one of {sorted(ARMS)}")
    write(folder, arm, ARMS[arm](Plan.of(folder), folder, engine))


def write(folder: Path, arm: str, answer: Answer) -> None:
    """Keep ``answer`` as what ``arm`` came to. Raises `StorageError`."""
    write_atomic(folder / f"{arm}.json", json.dumps(answer, indent=2).encode())


def _local(plan: Plan, folder: Path, _engine: str) -> Answer:
    return {"scores": fitting.local(plan, _base(plan), folder / "local", _say)}


def _central(plan: Plan, folder: Path, engine: str) -> Answer:
    if engine == "deepspeed":
        return {"engine": engine, "scores": joint.train(plan, folder)}
    return {"engine": engine, "scores": fitting.pooled(plan, _base(plan), folder / "central", _say)}


def _published(plan: Plan, folder: Path, _engine: str) -> Answer:
    """Scores here of what the federation published, where sites' own scores are none or of some rows only."""
    from fedpeft.registry import Registry

    registry, base = Registry(folder / "coordinator" / "registry"), _base(plan)
    return {"scores": {name: fitting.score(plan, base, registry.load(name)) for name in plan.tasks}}


ARMS: dict[str, Callable[[Plan, Path, str], Answer]] = {"local": _local, "central": _central, "published": _published}


def _base(plan: Plan) -> Any:
    from fedpeft.bases import load_base

    return load_base(plan.base)


def _say(line: str) -> None:
    """Indented, so that whoever follows the log knows progress from other output."""
    print(f"  {line}", flush=True)
