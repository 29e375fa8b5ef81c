"""Three sites and their federation, as files; all of it played in one process."""

from __future__ import annotations

import json
from pathlib import Path

from fedpeft.bases import Base
from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.state import TaskRound
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

SITES = ("east", "north", "south")
FEDERATION = """
name = "masked"
seed = 5
rounds = {rounds}
state = "coordinator"
[base]
max_tokens = 24
[method]
kind = "lora"
r = 4
[training]
steps = 4
batch_size = 4
lr = 0.003
[cohort]
min_sites = 3
deadline = 120.0
[link]
port = {port}
[tasks.colour]
kind = "classification"
labels = ["blue", "red"]
"""
SITE = """
name = "{name}"
coordinator = "127.0.0.1:{port}"
state = "{name}"
threads = 1
device = "cpu"
[base]
max_tokens = 24
[policy]
require_secure_aggregation = {masked}
min_cohort = 3
[data.colour]
path = "{name}.jsonl"
"""


def stage(folder: Path, port: int, masked: bool, rounds: int = 2) -> Path:
    """The files of a federation, as people would write them."""
    folder.mkdir()
    (folder / "federation.toml").write_text(FEDERATION.format(rounds=rounds, port=port))
    for number, name in enumerate(SITES):
        (folder / f"{name}.toml").write_text(SITE.format(name=name, port=port, masked=str(masked).lower()))
        rows = [
            {"text": f"{('sea sky', 'fire rose')[(i + number) % 2]} {i}", "label": ("blue", "red")[(i + number) % 2]} for i in range(20)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def workers(folder: Path, base: Base) -> dict[str, Worker]:
    made = {name: Worker(load_site(folder / f"{name}.toml")) for name in SITES}
    for worker in made.values():
        worker.__dict__["base"] = base
    return made


def in_memory(folder: Path, base: Base, **overrides: str) -> tuple[list[TaskRound], dict[str, Worker]]:
    config, sites = load_federation(folder / "federation.toml", overrides), workers(folder, base)
    setup, publisher = build(config)
    transport = MemoryTransport({name: worker.handle for name, worker in sites.items()}, Hello(tasks=["colour"]))
    coordinator = Coordinator(setup, Journal(config.database_url), Store(config.state / "blobs"), transport, Events(None), publisher)
    return [past.tasks["colour"] for past in coordinator.run()], sites


def same(ours: list[TaskRound], theirs: list[TaskRound]) -> None:
    assert [row.outcome for row in ours] == ["updated"] * len(theirs), ours[-1].reason
    assert [row.after for row in ours] == [row.after for row in theirs]
    assert [(row.weight, row.counters, row.scores, row.card) for row in ours] == [
        (row.weight, row.counters, row.scores, row.card) for row in theirs
    ]
