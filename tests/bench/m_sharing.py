"""M1: what sharing a factor over tasks does to each of them, on real text: four tasks, four sites, few rows, through real rounds.

    python -m tests.bench m_sharing        (FEDPEFT_SHARED set, or ../shared; about four CPU minutes; --repeats 15: three seeds)

Accuracy on held-out rows after the last round, with every task alone ([sharing] absent), and with A, B or both shared; "gain" is the
mean over the shared steps of what the coordinator's report says (loss of the task's own step less loss of the common one). Four fifths of
the time are the base's own matrix products, so nothing but smaller sizes makes it shorter: texts of 24 tokens, batches of 8.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedpeft import config
from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

SHARED = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[3] / "shared")) / "data"
SITES = ("a", "b", "c", "d")
TRAIN, TEST = 32, 60
"""Rows of a task to train on at one site, and held out in all."""
ROUNDS = 8
CASES: dict[str, dict[str, Any]] = {
    "each task alone": {},
    "A shared": {"sharing": {"share": "A", "report": True}},
    "B shared": {"sharing": {"share": "B", "report": True}},
    "both shared": {"sharing": {"share": "both", "report": True}},
}
Row = dict[str, str]


def run(repeats: int) -> list[dict[str, object]]:
    """The table; every five of ``repeats`` are a seed more, accuracies averaged over them."""
    tasks, base = _tasks(), load_base(BaseSpec("minilm", max_tokens=24), "cpu")
    rows: list[dict[str, object]] = []
    alone: dict[str, float] = {}
    for case, settings in CASES.items():
        found = [_federate(tasks, base, settings, seed) for seed in range(max(1, repeats // 5))]
        accuracy = {task: fmean(scores[task] for scores, _ in found) for task in tasks}
        gains = {task: fmean(gain[task] for _, gain in found) for task in tasks} if settings else {}
        alone = alone or accuracy
        for task in tasks:
            rows.append(_row(f"{task}, {case}", accuracy[task], alone[task], gains.get(task)))
        rows.append(_row(f"mean of tasks, {case}", fmean(accuracy.values()), fmean(alone.values()), None))
    return rows


def _row(case: str, ours: float, peer: float, gain: float | None) -> dict[str, object]:
    told = "" if gain is None else f", report's gain {gain:+.4f} nats"
    return {"row": "M1", "case": case + told, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "accuracy; peer: alone"}


def _federate(tasks: dict[str, list[Row]], base: Base, settings: dict[str, Any], seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy of each task after the last round, and the mean gain that the report gives."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = {
            "name": "sharing",
            "seed": seed,
            "rounds": ROUNDS,
            "state": str(folder / "state"),
            "evaluate_every": 4,
            "base": {"model": "minilm", "max_tokens": 24},
            "method": {"kind": "lora", "r": 8, "targets": ["attention"]},
            "training": {"steps": 6, "batch_size": 8, "lr": 2e-3, "lr_by_role": {"head": 1e-2}},
            "cohort": {"min_sites": 2, "wait_for_sites": len(SITES)},
            "tasks": {task: {"kind": "classification", "labels": sorted({row["label"] for row in rows})} for task, rows in tasks.items()},
            **settings,
        }
        made = config.parse(table, FederationConfig, "sharing")
        workers = _workers(folder, tasks, base, seed)
        setup, _ = build(made)
        transport = MemoryTransport({site: worker.handle for site, worker in workers.items()}, Hello(tasks=sorted(tasks)))
        rounds = Coordinator(setup, Journal(made.database_url), Store(made.state / "blobs"), transport, Events(None)).run()
    gains = {task: [past.tasks[task].gain["gain"] for past in rounds if past.tasks[task].gain] for task in tasks}
    scores = {task: rounds[-1].tasks[task].scores["accuracy"] for task in tasks}
    return scores, {task: fmean(found) if found else 0.0 for task, found in gains.items()}


def _workers(folder: Path, tasks: dict[str, list[Row]], base: Base, seed: int) -> dict[str, Worker]:
    """Sites with rows of three tasks each, so that no two hold the same; the held-out rows lie at those that train the task."""
    rng, names = np.random.default_rng(seed), list(tasks)
    workers = {}
    for place, site in enumerate(SITES):
        lines = [f'name = "{site}"', f'state = "{site}"', 'device = "cpu"', "threads = 1", "[base]", 'model = "minilm"', "max_tokens = 24"]
        for task in names[:place] + names[place + 1 :]:
            train = [row for row in tasks[task] if row["split"] == "train"]
            held = [row for row in tasks[task] if row["split"] == "test"]
            some = [train[i] for i in rng.choice(len(train), TRAIN, replace=False)] + held[place :: len(SITES)]
            (folder / f"{site}-{task}.jsonl").write_text("\n".join(map(json.dumps, some)))
            lines += [f"[data.{task}]", f'path = "{site}-{task}.jsonl"']
        (folder / f"{site}.toml").write_text("\n".join(lines))
        workers[site] = Worker(load_site(folder / f"{site}.toml"))
        workers[site].__dict__["base"] = base
    return workers


def _tasks() -> dict[str, list[Row]]:
    """Intents of a bank, of a voice assistant and of a broad one, and spam: balanced where labels are many."""
    bank = _read("banking77", lambda row: row["label"])
    few = sorted({row["label"] for row in bank})[::8]
    return {
        "bank": _some([row for row in bank if row["label"] in few]),
        "voice": _some(_read("snips_slots", lambda row: row["label"], "prompt")),
        "domain": _some(_read("clinc150", lambda row: row["client"])),
        "spam": _some(_read("sms_spam", lambda row: row["label"])),
    }


def _read(name: str, label: Any, text: str = "text") -> list[Row]:
    lines = (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"text": row[text], "label": label(row), "split": row["split"]} for row in rows if row["split"] in ("train", "test")]


def _some(rows: list[Row]) -> list[Row]:
    """Training rows spread over the labels, and `TEST` held-out ones."""
    rng = np.random.default_rng(0)
    mixed = [rows[place] for place in rng.permutation(len(rows))]
    known = {row["label"] for row in mixed if row["split"] == "train"}
    train = [row for row in mixed if row["split"] == "train"][:1000]
    held = [row for row in mixed if row["split"] == "test" and row["label"] in known][:TEST]
    return train + held
