"""kill -9 of the coordinator, the SuperLink, a SuperNode and a worker in one run: the adapters are those of an undisturbed run.

The scheme is SCAFFOLD, whose sites and server both remember: what is lost or counted twice shows in the bits. The undisturbed
run is the same workers and the same coordinator in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport
from fedpeft_coordinator.up import hello

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROUNDS = 3
LIMIT = 240.0
SITES = ("north", "south")

FEDERATION = """
name = "chaos"
seed = 5
rounds = {rounds}
state = "coordinator"

[base]
model = "minilm"
max_tokens = 24

[method]
kind = "lora"
r = 4

[scheme]
kind = "scaffold"
factors = "alternating"

[training]
steps = 8
batch_size = 8
lr = 0.003
save_every = 1

[cohort]
min_sites = 2
wait_for_sites = 2
deadline = 200.0
retries = 6

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
model = "minilm"
quantization = "nf4"

[data.colour]
path = "{name}.jsonl"
"""


class Cast:
    """The processes of one federation, each started as a person would."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "federation.toml").write_text(FEDERATION.format(rounds=ROUNDS, port=port))
        for number, name in enumerate(SITES):
            (folder / f"{name}.toml").write_text(SITE.format(name=name, port=port))
            rows = [
                {
                    "text": f"{'sea sky water' if (i + number) % 2 else 'fire blood rose'} number {i}",
                    "label": ["red", "blue"][(i + number) % 2],
                }
                for i in range(40)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def start(self, name: str) -> None:
        verb = ["coordinator", "up", "federation.toml"] if name == "coordinator" else ["client", "join", f"{name}.toml"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "fedpeft", *verb], cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def calm(self) -> None:
        """Every round in this process."""
        config = load_federation(self.folder / "federation.toml")
        setup, publisher = build(config)
        workers = {name: Worker(load_site(self.folder / f"{name}.toml")) for name in SITES}
        transport = MemoryTransport({name: worker.handle for name, worker in workers.items()}, hello(setup))
        events, journal = Events(config.state / "events.jsonl"), Journal(config.database_url)
        Coordinator(setup, journal, Store(config.state / "blobs"), transport, events, publisher).run()

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def events(self) -> list[dict[str, object]]:
        path = self.folder / "coordinator" / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def seen(self, **facts: object) -> bool:
        return any(facts.items() <= event.items() for event in self.events())

    def wait(self, what: str, ready) -> None:
        end = time.monotonic() + LIMIT
        while not ready():
            if time.monotonic() > end:
                logs = {log.name: log.read_text(errors="replace")[-600:] for log in self.folder.glob("*.log")}
                pytest.fail(f"{what} did not come; {logs}")
            time.sleep(0.05)

    def finish(self) -> None:
        self.wait("the coordinator's end", lambda: self.running["coordinator"].poll() is not None)
        assert self.running["coordinator"].returncode == 0, (self.folder / "coordinator.log").read_text(errors="replace")[-2000:]

    def adapter(self) -> str:
        (manifest,) = (self.folder / "coordinator" / "registry" / "objects").glob("*/manifest.json")
        return str(json.loads(manifest.read_text())["adapter"])


@pytest.fixture
def cast(tmp_path):
    made: list[Cast] = []

    def make(name: str, port: int) -> Cast:
        (tmp_path / name).mkdir()
        made.append(Cast(tmp_path / name, port))
        return made[-1]

    yield make
    for one in made:
        one.end()


def _worker(cast: Cast, site: str) -> int:
    return int(json.loads((cast.folder / site / "worker.json").read_text())["pid"])


def _training(cast: Cast, site: str) -> bool:
    try:
        sign = json.loads((cast.folder / site / "worker.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(sign["busy"] == "colour")


def test_whatever_is_killed_the_adapter_is_the_same(cast, free_port):
    wild, calm = cast("wild", free_port), cast("calm", free_port)
    for name in ("coordinator", *SITES):
        wild.start(name)
    wild.wait("training at north", lambda: _training(wild, "north"))
    os.kill(_worker(wild, "north"), signal.SIGKILL)
    wild.wait("round 2", lambda: wild.seen(event="plan", round=2))
    os.kill(_link(wild), signal.SIGKILL)
    wild.wait("training at south", lambda: _training(wild, "south"))
    os.kill(wild.running["coordinator"].pid, signal.SIGKILL)
    wild.running["coordinator"].wait()
    wild.start("coordinator")
    wild.wait("round 3", lambda: wild.seen(event="plan", round=3))
    os.kill(_supernode(wild, "south"), signal.SIGKILL)
    wild.finish()
    calm.calm()
    assert wild.adapter() == calm.adapter()
    assert all(event["outcome"] == "updated" and not event["drops"] for event in _tasks(wild))


def _tasks(cast: Cast) -> list[dict[str, object]]:
    return [found for event in cast.events() if event["event"] == "round" for found in event["tasks"].values()]


def _link(cast: Cast) -> int:
    return [int(str(event["pid"])) for event in cast.events() if event["event"] == "link" and event.get("pid")][-1]


def _supernode(cast: Cast, site: str) -> int:
    rows = json.loads((cast.folder / site / "supervisor.json").read_text())["children"]
    return next(int(row["pid"]) for row in rows if row["name"] == "supernode")
