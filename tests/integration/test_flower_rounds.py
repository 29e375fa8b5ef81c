"""Real processes on loopback: the guarded SuperLink, real SuperNodes, our own executors, and kill -9 of each of them alone.

In the default tests test_chaos.py kills all of them in one run; masked/test_processes.py tries the public port, keeps a stranger out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from fedpeft.issuing import issue
from fedpeft_coordinator.supervise import free_port

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]
FAKE = Path(__file__).parents[1] / "unit" / "coordinator" / "fake.py"
PROCESS = Path(__file__).with_name("fake_process.py")
ROUNDS = 4


@pytest.fixture(scope="module")
def fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedpeft_fake_federation_flower", FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Kept:
    """A process that is started again whenever it ends: a stand-in for a site's supervisor."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.command, self.log, self.env = command, log, env
        self.over = threading.Event()
        self.process = self._start()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env)

    def _watch(self) -> None:
        while not self.over.wait(0.2):
            if self.process.poll() is not None:
                self.process = self._start()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()
        self.process.kill()
        self.process.wait()


class Stage:
    """A federation of real processes in one folder."""

    def __init__(self, folder: Path, names: list[str], pause: float = 0.2) -> None:
        self.keys = folder / "keys"
        self.folder, self.port = folder, free_port()
        self.env = {**os.environ, "FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        (folder / "secret").write_bytes(os.urandom(32))
        self.nodes, self.workers = {}, {}
        for name in names:
            port = free_port()
            self.nodes[name] = Kept(self._node(name, port), folder / f"{name}.node.log", self.env)
            worker = [sys.executable, str(PROCESS), "site", name, f"127.0.0.1:{port}", str(folder / "secret"), str(pause)]
            self.workers[name] = Kept(worker, folder / f"{name}.worker.log", self.env)
        self.coordinator = self.start()

    def _node(self, name: str, port: int) -> list[str]:
        script = str(Path(sys.executable).with_name("flower-supernode"))
        line = [sys.executable, script, "--superlink", f"127.0.0.1:{self.port}", "--port", str(port)]
        if self.keys.exists():
            line += ["--root-certificates", str(self.keys / "ca.crt"), "--auth-supernode-private-key", str(self.keys / f"{name}.key")]
        else:
            line += ["--insecure"]
        return [*line, "--isolation", "process", "--superexec-auth-secret-file", str(self.folder / "secret")]

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(PROCESS), "flower", str(self.folder), str(self.port), str(ROUNDS)]
        with (self.folder / "coordinator.log").open("a") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.env)

    def events(self, kind: str) -> list[dict[str, object]]:
        path = self.folder / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [row for row in map(json.loads, lines) if row["event"] == kind]

    def wait_for(self, ready: Callable[[], bool], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, (self.folder / "coordinator.log").read_text()[-3000:]
            assert self.coordinator.poll() is None, (self.folder / "coordinator.log").read_text()[-3000:]
            time.sleep(0.05)

    def finish(self) -> dict[str, str]:
        out, _ = self.coordinator.communicate(timeout=300)
        assert self.coordinator.returncode == 0, (self.folder / "coordinator.log").read_text()[-3000:]
        return dict(json.loads(out.strip().split("\n")[-1]))

    def stop(self) -> None:
        for kept in (*self.workers.values(), *self.nodes.values()):
            kept.stop()
        if self.coordinator.poll() is None:
            self.coordinator.kill()
        self.coordinator.wait()
        if self.coordinator.stdout:
            self.coordinator.stdout.close()


@pytest.fixture
def stage(tmp_path: Path, fake: ModuleType) -> Iterator[Stage]:
    made = Stage(tmp_path, sorted(fake.HOLDINGS))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def undisturbed(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("memory")
    federation = fake.Federation(folder, replace(fake.setup(rounds=ROUNDS), evaluate_every=0), fake.sites())
    federation.open().run()
    return dict(federation.final())


def test_kill_the_coordinator(stage: Stage, undisturbed: dict[str, str]) -> None:
    for moment in (1, 5):
        stage.wait_for(lambda moment=moment: len(stage.events("answer")) >= moment)  # type: ignore[misc]
        stage.coordinator.send_signal(signal.SIGKILL)
        stage.coordinator.communicate()
        stage.coordinator = stage.start()
    assert stage.finish() == undisturbed


def test_kill_the_superlink(stage: Stage, undisturbed: dict[str, str]) -> None:
    stage.wait_for(lambda: len(stage.events("answer")) >= 2)
    os.kill(int(str([row for row in stage.events("link") if "pid" in row][-1]["pid"])), signal.SIGKILL)
    assert stage.finish() == undisturbed


def test_kill_a_supernode(stage: Stage, undisturbed: dict[str, str]) -> None:
    stage.wait_for(lambda: any(row["step"] == "collecting" for row in stage.events("step")))
    stage.nodes["west"].process.send_signal(signal.SIGKILL)
    assert stage.finish() == undisturbed


def test_kill_a_worker(stage: Stage, undisturbed: dict[str, str]) -> None:
    stage.wait_for(lambda: any(row["step"] == "collecting" for row in stage.events("step")))
    stage.workers["west"].process.send_signal(signal.SIGKILL)
    assert stage.finish() == undisturbed


def test_tls_and_registered_keys(fake: ModuleType, undisturbed: dict[str, str], tmp_path: Path) -> None:
    names = sorted(fake.HOLDINGS)
    issue(tmp_path / "keys", ["127.0.0.1"], names)
    stage = Stage(tmp_path, names)
    try:
        stage.wait_for(lambda: len(stage.events("answer")) >= 2)
        os.kill(int(str([row for row in stage.events("link") if "pid" in row][-1]["pid"])), signal.SIGKILL)
        assert stage.finish() == undisturbed
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{stage.port}/health")
    finally:
        stage.stop()
    assert "Unregistered" not in (tmp_path / "coordinator.log").read_text()


def test_a_stranger_without_a_registered_key_stays_outside(fake: ModuleType, tmp_path: Path) -> None:
    names = sorted(fake.HOLDINGS)
    issue(tmp_path / "keys", ["127.0.0.1"], names)
    (tmp_path / "keys" / "west.pub").unlink()
    stage = Stage(tmp_path, names)
    try:
        stage.wait_for(lambda: {str(row["site"]) for row in stage.events("site")} == {"north", "south"})
        log = tmp_path / "west.node.log"
        stage.wait_for(lambda: "Failed to initialize the connection" in log.read_text())
    finally:
        stage.stop()
    assert {str(row["site"]) for row in stage.events("site")} == {"north", "south"}
