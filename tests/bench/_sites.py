"""Real rows at real workers in one process, over the in-memory transport: a federation of real text for the benchmarks of sharing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import config
from fedpeft.bases import Base
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.state import Round
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport
from fedpeft_coordinator.up import hello

SHARED = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[3] / "shared")) / "data"
TOKENS = 24
TRAIN, TEST = 32, 60
"""Rows of a task to train on at one site, and held out in all."""
Row = dict[str, str]
Held = Mapping[str, Mapping[str, Sequence[Row]]]
"""Site -> task -> its rows, with their splits."""


def read(name: str, label: Any, text: str = "text") -> list[Row]:
    """Rows of a real data set; ``label`` finds a row's."""
    lines = (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"text": row[text], "label": label(row), "split": row["split"]} for row in rows if row["split"] in ("train", "test")]


def bank() -> list[Row]:
    """Intents of a bank's customers: every eighth of 77."""
    rows = read("banking77", lambda row: row["label"])
    few = sorted({row["label"] for row in rows})[::8]
    return some([row for row in rows if row["label"] in few])


def voice() -> list[Row]:
    """Intents of what is said to a voice assistant."""
    return some(read("snips_slots", lambda row: row["label"], "prompt"))


def some(rows: list[Row]) -> list[Row]:
    """Training rows spread over the labels, and `TEST` held-out ones."""
    rng = np.random.default_rng(0)
    mixed = [rows[place] for place in rng.permutation(len(rows))]
    known = {row["label"] for row in mixed if row["split"] == "train"}
    train = [row for row in mixed if row["split"] == "train"][:1000]
    held = [row for row in mixed if row["split"] == "test" and row["label"] in known][:TEST]
    return train + held


def part(rows: Sequence[Row], place: int, places: int, rng: np.random.Generator) -> list[Row]:
    """What the site at ``place`` holds of ``rows``: `TRAIN` to train on, drawn by ``rng``, and its share of the held-out ones."""
    train, held = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    return [train[i] for i in rng.choice(len(train), TRAIN, replace=False)] + held[place::places]


def labels(rows: Sequence[Row]) -> list[str]:
    """The labels that occur."""
    return sorted({row["label"] for row in rows})


def federate(table: Mapping[str, Any], held: Held, base: Base) -> list[Round]:
    """All rounds of a federation with the keys of ``table`` over the sites of ``held``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "name": "text",
            "state": str(folder / "state"),
            "base": {"model": "minilm", "max_tokens": TOKENS},
            "method": {"kind": "lora", "r": 8, "targets": ["attention"]},
            "training": {"steps": 5, "batch_size": 8, "lr": 2e-3, "lr_by_role": {"head": 1e-2}},
            "cohort": {"min_sites": 1, "wait_for_sites": len(held)},
        }
        made = config.parse({**settings, **table}, FederationConfig, "bench")
        workers = {site: _worker(folder, site, rows, base) for site, rows in held.items()}
        setup, _ = build(made)
        transport = MemoryTransport({site: worker.handle for site, worker in workers.items()}, hello(setup))
        return Coordinator(setup, Journal(made.database_url), Store(made.state / "blobs"), transport, Events(None)).run()


def _worker(folder: Path, site: str, held: Mapping[str, Sequence[Row]], base: Base) -> Worker:
    lines = [
        f'name = "{site}"',
        f'state = "{site}"',
        'device = "cpu"',
        "threads = 1",
        "[base]",
        'model = "minilm"',
        f"max_tokens = {TOKENS}",
    ]
    for task, rows in held.items():
        (folder / f"{site}-{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines += [f"[data.{task}]", f'path = "{site}-{task}.jsonl"']
    (folder / f"{site}.toml").write_text("\n".join(lines))
    worker = Worker(load_site(folder / f"{site}.toml"))
    worker.__dict__["base"] = base
    return worker
