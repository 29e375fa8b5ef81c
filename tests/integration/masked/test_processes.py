"""Three sites under masks as real processes over the real link: they end at the bits of real workers that send in the clear.

It is the README's tour over several machines: TLS, and registered site keys made by `fedpeft certificates`.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.integration.masked.staging import SITES, stage

from fedpeft.cli.main import run
from fedpeft.control.cache import Cache
from fedpeft.control.client import RemoteFederation, RemoteRegistry, RemoteRouter
from fedpeft.control.place import Place
from fedpeft.errors import LinkError
from fedpeft.processes import free_port as unused
from fedpeft.registry import Registry
from fedpeft.routing.cardfile import lora_modules
from fedpeft.tasks import read_rows
from fedpeft_client import supernode
from fedpeft_client.config import load_site
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.state import TaskRound
from fedpeft_coordinator.status import status
from fedpeft_coordinator.supervise import listens

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture
def processes() -> Iterator[Any]:
    running: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("ab") as log:
            line = [sys.executable, "-m", *command]
            running.append(subprocess.Popen(line, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
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
[base]
"""
LINK = """[link]
node_auth = true
node_keys = "certs"
tls = { ca = "certs/ca.crt", cert = "certs/server.pem", key = "certs/server.key" }
"""
KEYS = """
[tls]
root_certificates = "certs/ca.crt"
[auth]
key = "{key}"
"""


def secured(folder: Path, control: int) -> None:
    """The federation in ``folder`` with TLS, registered sites and a control plane; and the files of a stranger, whom nobody registered."""
    sites = [part for name in SITES for part in ("--site", name)]
    assert run(["certificates", str(folder / "certs"), "--host", "localhost", *sites]) == 0
    assert run(["certificates", str(folder / "elsewhere"), "--host", "localhost", "--site", "stranger"]) == 0
    path = folder / "federation.toml"
    text = path.read_text().replace("[base]\n", CONTROL.format(port=control), 1)
    path.write_text(text.replace("[link]\n", LINK, 1))
    for name in SITES:
        site = (folder / f"{name}.toml").read_text().replace('"127.0.0.1:', '"localhost:', 1)
        (folder / f"{name}.toml").write_text(site + KEYS.format(key=f"certs/{name}.key"))
    stranger = site.replace(f'"{name}"', '"stranger"') + KEYS.format(key="elsewhere/stranger.key")
    (folder / "stranger.toml").write_text(stranger)


def test_real_processes_end_at_the_bits_of_the_clear(tmp_path: Path, free_port: int, clear: list[TaskRound], processes: Any) -> None:
    """While they train, others follow the rounds, pull what was published, route by its gates and roll back, over the control plane."""
    folder, control = stage(tmp_path / "f", free_port, masked=True), unused()
    secured(folder, control)
    coordinator = processes(folder, "coordinator", "fedpeft", "coordinator", "up", "federation.toml")
    url = Place(f"grpc://127.0.0.1:{control}")

    def up() -> bool:  # sites are registered as soon as the link is up, while the base is built
        assert coordinator.poll() is None, (folder / "coordinator.log").read_text()
        return listens("127.0.0.1", control) and listens("127.0.0.1", free_port)

    until(up, folder)
    stranger = load_site(folder / "stranger.toml")
    (folder / "secret").write_text("0" * 64)
    processes(folder, "stranger", "fedpeft_client.supernode", *supernode.arguments(stranger, unused(), folder / "secret"))
    for name in SITES:
        processes(folder, name, "fedpeft", "client", "join", f"{name}.toml")
    only_the_fleet(folder, free_port)
    processes(folder, "watch", "fedpeft", "coordinator", "watch", url.root, "--json")
    followed = folder / "watch.log"
    until(lambda: '"event": "published"' in followed.read_text(), folder)
    worker = int(json.loads((folder / "north" / "worker.json").read_text())["pid"])
    os.kill(worker, signal.SIGSTOP)  # so that the federation does not end before all is asked
    try:
        assert (loads_torch(worker), loads_torch(coordinator.pid)) == (True, False)
        published = used(url, tmp_path / "cache", folder)
        joined_once(folder)
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: coordinator.poll() is not None, folder)
    log = (folder / "coordinator.log").read_text(errors="replace")
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
    assert {event["site"] for event in whole if event["event"] in ("site", "answer")} == set(SITES)
    assert "Failed to initialize the connection" in (folder / "stranger.log").read_text()
    told = status(load_federation(folder / "federation.toml"))["sites"]
    assert {name: site["base_loads"] for name, site in told.items()} == dict.fromkeys(SITES, 1)


def only_the_fleet(folder: Path, port: int) -> None:
    """The public port serves the fleet calls alone, and nothing without TLS; the private one nobody without the secret."""
    private = f"http://127.0.0.1:{json.loads((folder / 'coordinator' / 'link' / 'link.json').read_text())['private_port']}"
    trusted = ssl.create_default_context(cafile=str(folder / "certs" / "ca.crt"))
    with httpx.Client(base_url=f"https://localhost:{port}", verify=trusted) as public:
        assert public.get("/health").status_code == 200
        for path in ("/v1/control/start-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task", "/docs", "/openapi.json"):
            assert public.post(path, content=b"").status_code == 404, path
            assert httpx.post(f"{private}{path}", content=b"").status_code == 404, f"{path} without the secret"
        for path in ("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run"):
            assert public.post(f"https://localhost:{port}{path}", content=b"").status_code in (404, 405), path
        assert public.post("/v1/fleet/push-object", content=iter([b"of unknown length"])).status_code == 413
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def loads_torch(process: int) -> bool:
    """Whether torch's library is in the memory of ``process``."""
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


def joined_once(folder: Path) -> None:
    """A second supervisor on a site's state folder is refused, and the first's secret is its owner's."""
    command = [sys.executable, "-m", "fedpeft", "client", "join", "east.toml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert "already runs a site on this state folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "east" / "secret").stat().st_mode & 0o777 == 0o600


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
        assert patiently(lambda: RemoteRouter(link).ask("fire rose 3", kind="gate")).weights == {"colour": pytest.approx(1.0)}
        assert (far.rollback("colour", "1").action, far.get("colour").number) == ("rollback", 2)
        return adapter.tensors.digest


def patiently(ask: Any, times: int = 5) -> Any:
    """The answer, asked for again where it was late: for its first text a control plane loads the base, and a busy machine takes long."""
    for _ in range(times - 1):
        try:
            return ask()
        except LinkError:
            continue
    return ask()


def until(ready: Any, folder: Path, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, {log.name: log.read_text(errors="replace")[-800:] for log in folder.glob("*.log")}
        time.sleep(0.1)
