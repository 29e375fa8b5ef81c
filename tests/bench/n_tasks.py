"""N5: ten tasks of real text in one central job against ten jobs of one task each, by accuracy on held-out rows; same examples per task.

    python -m tests.bench n_tasks        (FEDPEFT_SHARED set, or ../shared; four minutes on one core)

MiniLM, LoRA on attention, one rank over DeepSpeed: jobs as `fedpeft central train` runs them. Every arm takes `STEPS` steps with `EACH`
examples of each task, in an order of its own, and every task's adapter and head start from the same values; ``repeats`` is ignored.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np

from fedpeft import config
from fedpeft.central.job import run as train
from fedpeft.central.world import World, joined
from fedpeft.processes import free_port
from fedpeft.training.config import CentralConfig

SHARED = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[3] / "shared")) / "data"
STEPS, EACH, TRAIN, TEST = 60, 4, 80, 100
ARMS: dict[str, dict[str, Any]] = {
    "together": {},
    "together, one shared beside": {"shared": True},
    "together, one shared beside, PCGrad": {"shared": True, "conflicts": "pcgrad"},
}
INTENTS = {"travel": "travel", "work": "work", "kitchen": "kitchen_and_dining"}
Row = dict[str, str]


def run(repeats: int) -> list[dict[str, object]]:
    """The table: accuracy by task and arm, and CPU seconds of training and scoring."""
    tasks = ten_tasks()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name, joined(world := World(port=free_port()), 60):
        folder = Path(name)
        for task, own in tasks.items():
            (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, own)))
        alone: dict[str, float] = {}
        began = process_time()
        for task, own in tasks.items():
            alone |= _scores(folder, world, {task: own}, f"alone-{task}", {})
        seconds = {"alone": process_time() - began}
        for arm, settings in ARMS.items():
            began = process_time()
            found = _scores(folder, world, tasks, arm.replace(", ", "-").replace(" ", "-").lower(), settings)
            seconds[arm] = process_time() - began
            rows += [_row(f"{task}, {arm}", found[task], alone[task], "accuracy; peer: a job of its own") for task in tasks]
            rows.append(_row(f"mean of ten, {arm}", fmean(found.values()), fmean(alone.values()), "accuracy; peer: jobs of their own"))
    return rows + [
        _row(f"one job, {arm}", spent, seconds["alone"], "CPU s; peer: ten jobs") for arm, spent in seconds.items() if arm in ARMS
    ]


def _row(case: str, ours: float, peer: float, unit: str) -> dict[str, object]:
    return {
        "row": "N5",
        "case": case,
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer if "accuracy" in unit else peer / ours,
        "unit": unit,
    }


def _scores(folder: Path, world: World, tasks: dict[str, list[Row]], name: str, settings: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each task after one job."""
    found = train(config.parse(job_of(folder, name, tasks, settings), CentralConfig, name), world).scores
    return {task: found[task]["accuracy"] for task in tasks}


def job_of(folder: Path, name: str, tasks: dict[str, list[Row]], settings: dict[str, Any]) -> dict[str, Any]:
    """The job's file as a table; the tasks' rows lie in ``folder``."""
    return {
        "name": name,
        "seed": 0,
        "output": str(folder / name),
        "base": {"model": "minilm", "max_tokens": 32},
        "method": {"kind": "lora", "r": 8, "targets": ["attention"]},
        "training": {"steps": STEPS, "batch_size": EACH * len(tasks), "lr": 2e-3, "lr_by_role": {"head": 1e-2}, "save_every": STEPS},
        "deepspeed": {"stage": 0, "timeout": 60.0},
        "mixing": "equal",
        "tasks": {
            task: {
                "kind": "classification",
                "labels": sorted({row["label"] for row in rows}),
                "metrics": ["accuracy"],
                "data": {"path": str(folder / f"{task}.jsonl")},
            }
            for task, rows in tasks.items()
        },
        **settings,
    }


def ten_tasks() -> dict[str, list[Row]]:
    """Ten tasks of 2 to 15 labels: intents of a bank, a voice assistant and three domains; domain, spam, sums, platform and language."""
    clinc, tldr, bank = _read("clinc150"), _read("tldr"), _read("banking77")
    few = sorted({row["label"] for row in bank})[::8]
    found = {
        "bank": _named([row for row in bank if row["label"] in few], "text", "label"),
        "voice": _named(_read("snips_slots"), "prompt", "label"),
        "spam": _named(_read("sms_spam"), "text", "label"),
        "sums": _named(_read("svamp"), "prompt", "label"),
        "domain": _named(clinc, "text", "client"),
        "platform": _named([{**row, "label": row["client"].partition(":")[0]} for row in tldr], "prompt", "label"),
        "language": _named([{**row, "label": row["client"].partition(":")[2] or "en"} for row in tldr], "prompt", "label"),
    }
    found |= {task: _named([row for row in clinc if row["client"] == domain], "text", "label") for task, domain in INTENTS.items()}
    return {task: _some(rows) for task, rows in found.items()}


def _named(rows: list[Row], text: str, label: str) -> list[Row]:
    return [{"text": row[text], "label": row[label], "split": row["split"]} for row in rows]


def _read(name: str) -> list[Row]:
    return [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _some(rows: list[Row]) -> list[Row]:
    """`TRAIN` rows to train on, and `TEST` held-out ones of labels seen in them."""
    mixed = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    train = [row for row in mixed if row["split"] == "train"][:TRAIN]
    known = {row["label"] for row in train}
    return train + [row for row in mixed if row["split"] == "test" and row["label"] in known][:TEST]
