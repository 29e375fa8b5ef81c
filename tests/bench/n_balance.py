"""N4: what balancing costs a step of a central job: four tasks of real text, MiniLM, one shared adapter beside each own, one rank.

    python -m tests.bench n_balance        (FEDPEFT_SHARED set, or ../shared; about a minute on one core)

CPU seconds of a step, the least over jobs that take turns; the peer is the same job with equal weights. CoBa looks at most at 16 held-out
rows a task, after every tenth step by default: the cost of a look is spread over ten steps here.
"""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

from tests.bench.n_tasks import job_of, ten_tasks

from fedpeft import config
from fedpeft.central.job import run as train
from fedpeft.central.progress import Report
from fedpeft.central.world import World, joined
from fedpeft.processes import free_port
from fedpeft.training.config import CentralConfig

TASKS = ("bank", "voice", "travel", "domain")
STEPS, EVERY = 6, 10
KINDS: dict[str, dict[str, Any]] = {
    "equal": {},
    "uncertainty": {"balance": "uncertainty"},
    "cosines told": {"conflicts": "report"},
    "PCGrad": {"conflicts": "pcgrad"},
    "a look at every step": {"balance": "coba", "validation": {"every": 1, "examples": 32}},
}


def run(repeats: int) -> list[dict[str, object]]:
    """One row a kind."""
    best = dict.fromkeys(KINDS, float("inf"))
    with tempfile.TemporaryDirectory() as name, joined(world := World(port=free_port()), 60):
        folder, tasks = Path(name), {task: rows for task, rows in ten_tasks().items() if task in TASKS}
        for task, own in tasks.items():
            (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, own)))
        for turn in range(max(1, min(repeats, 3))):
            for kind, settings in KINDS.items():
                training = {"steps": STEPS, "batch_size": 16, "save_every": STEPS}
                table = job_of(folder, f"job-{turn}-{list(KINDS).index(kind)}", tasks, {"shared": True, **settings, "training": training})
                best[kind] = min(best[kind], _seconds(config.parse(table, CentralConfig, kind), world))
    look = best.pop("a look at every step") - best["equal"]
    best["coba"] = best["equal"] + look / EVERY
    return [_row(kind, seconds, best["equal"]) for kind, seconds in best.items()]


def _seconds(job: CentralConfig, world: World) -> float:
    """The least of a step; the first starts the engine, the last is followed by scoring."""
    ticks: list[float] = []

    def heard(report: Report) -> None:
        ticks.append(process_time())

    train(job, world, progress=heard)
    return min(after - before for before, after in pairwise(ticks[:-1]))


def _row(case: str, ours: float, peer: float) -> dict[str, object]:
    return {"row": "N4", "case": f"a step, {case}", "ours": ours, "peer": peer, "ratio": peer / ours, "unit": "CPU s; peer: equal weights"}
