"""One JSON file per cell, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.orderings.simulate import Job, Setting

Run = Callable[[], dict[int, float]]


@dataclass(frozen=True)
class Store:
    """Results under ``folder``; no cell is begun after ``deadline`` (seconds of the monotonic clock)."""

    folder: Path
    deadline: float

    def cell(self, experiment: str, arm: str, setting: Setting, job: Job, run: Run) -> float | None:
        """Final accuracy of a cell: read, or run and written; None where the time is up."""
        facts = {"experiment": experiment, "arm": arm, "setting": asdict(setting), "job": _facts(job)}
        path = (
            self.folder
            / experiment
            / f"{arm.replace('/', '-')}-r{job.rank}-s{job.seed}-lr{job.local.lr:g}-{job.split}-{_digest(facts)}.json"
        )
        if not path.exists():
            if time.monotonic() > self.deadline:
                return None
            began, clock = time.process_time(), time.monotonic()
            curve = run()
            times = {"cpu_seconds": time.process_time() - began, "seconds": time.monotonic() - clock}
            write(path, facts | {"accuracy": curve} | times)
            print(f"{experiment} {arm} r={job.rank} seed={job.seed} lr={job.local.lr:g} {job.split}: {_last(curve):.4f}", flush=True)
        return _last(json.loads(path.read_text(encoding="utf-8"))["accuracy"])


def write(path: Path, value: Any) -> None:
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2), encoding="utf-8")
    os.replace(part, path)


def _facts(job: Job) -> dict[str, Any]:
    """The job; a head's learning rate only where it is another than the common one."""
    facts = asdict(job)
    if facts["local"]["head"] in (None, job.local.lr):
        del facts["local"]["head"]
    return facts


def _last(curve: dict[Any, float]) -> float:
    return curve[max(curve, key=int)]


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
