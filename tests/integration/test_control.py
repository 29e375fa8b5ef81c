"""The control plane as processes: `coordinator serve`, killed in the middle of streams, and beside the rounds of `coordinator up`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases.spec import HeadSpec
from fedpeft.cli.main import run
from fedpeft.control import files
from fedpeft.control.address import Address
from fedpeft.control.cache import Cache
from fedpeft.control.client import RemoteFederation, RemoteRegistry
from fedpeft.control.link import Link
from fedpeft.control.staging import Landing
from fedpeft.errors import LinkError, StorageError
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry
from fedpeft.registry.manifest import NAME, SIGNATURE
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.v1 import registry_pb2 as pb

pytestmark = pytest.mark.integration


def publish(registry: Registry, seed: int, width: int = 1_000_000) -> Any:
    """A version of 16 MB and its router card."""
    layout = Layout.of(
        [Entry("A", "base_model.model.q.lora_A.weight", (2, width)), Entry("B", "base_model.model.q.lora_B.weight", (width, 2))]
    )
    spec = AdapterSpec("area", "f" * 64, "minilm", METHODS["lora"](r=2, alpha=2.0), HeadSpec("lm"), layout)  # type: ignore[call-arg]
    values = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    return registry.publish(Adapter(spec, Tensors(layout, values)), Manifest(round=seed), f"run/{seed}")


class Serve:
    """`fedpeft coordinator serve` on a folder, which may be killed and started again on the same port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "fedpeft",
            "coordinator",
            "serve",
            str(self.folder),
            "--set",
            f"port={self.port}",
            "--set",
            "embed=false",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert "control plane of" in (first := self.process.stdout.readline()), first  # type: ignore[union-attr]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]

    def far(self, cache: Path) -> RemoteRegistry:
        return RemoteRegistry(Link(Address("127.0.0.1", self.port)), Cache(cache))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "registry")
    publish(found, 1)
    return found


@pytest.fixture
def server(registry: Registry, free_port: int) -> Any:
    found = Serve(registry.root, free_port)
    yield found
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(20) == 0
    found.process.stdout.close()  # type: ignore[union-attr]


def test_killed_in_the_middle_of_a_push_it_goes_on_where_it_stopped(server: Serve, registry: Registry, tmp_path: Path) -> None:
    other = Registry(tmp_path / "other")
    version = publish(other, 2)
    registry.objects.keys.trust(other.objects.keys.public())
    held = other.files(version.digest)
    content = {name: held[name] for name in sorted(version.manifest.files)}
    sizes = {name: len(data) for name, data in content.items()}
    spans, staging = list(files.spans(sizes, 0)), registry.root / "control" / "staging"

    def half() -> Any:
        yield pb.PushPart(head=pb.PushHead(manifest=held[NAME], signature=held[SIGNATURE], files=files.to_proto(sizes)))
        for name, start, end, place in spans[: len(spans) // 2]:
            part = pb.PushPart()
            files.fill(part.chunk, content[name][start:end], place)
            yield part
        deadline = time.monotonic() + 30
        while sum(path.stat().st_size for path in staging.glob("*/*")) < spans[len(spans) // 2][3] and time.monotonic() < deadline:
            time.sleep(0.02)
        server.kill()

    far = server.far(tmp_path / "cache")
    with pytest.raises(LinkError), far.link.broken(far.link.stub("Registry").Push.future(half())) as call:
        call.result(60)
    assert registry.verify() == ()
    assert len(registry.list()) == 1
    server.start()
    staged = far.link.unary("Registry", "Staged", pb.StagedRequest(digest=version.digest, files=files.to_proto(sizes)))
    assert staged.offset == spans[len(spans) // 2][3] > 0
    assert far.push(other, "area").number == 2
    assert (registry.verify(), registry.load("area").digest) == ((), other.load("area").digest)
    assert list(staging.iterdir()) == []


def test_killed_in_the_middle_of_a_pull_the_client_goes_on_by_itself(
    server: Serve, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets, killed, real = [], threading.Event(), Landing.write

    def write(self: Landing, part: pb.Chunk, offset: int) -> int:
        offsets.append(offset)
        if len(offsets) == 6:
            server.kill()
            threading.Thread(target=lambda: (time.sleep(1), server.start(), killed.set())).start()
        return real(self, part, offset)

    monkeypatch.setattr(Landing, "write", write)
    assert server.far(tmp_path / "cache").load("area").digest == registry.load("area").digest
    assert killed.wait(20)
    assert len(offsets) == len(set(offsets)), "no chunk was taken twice"
    assert offsets == sorted(offsets)


def test_the_command_line_near_and_far(server: Serve, registry: Registry, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    url, mine = f"grpc://127.0.0.1:{server.port}", str(tmp_path / "mine")

    def said(*arguments: str, code: int = 0) -> str:
        assert run(["adapters", *arguments]) == code
        seen = capsys.readouterr()
        return str(seen.out + seen.err)

    assert json.loads(said("list", "--registry", url, "--json"))[0]["digest"] == registry.resolve("area")
    assert f"in {mine}" in said("pull", "area", "--from", url, "--registry", mine)
    publish(Registry(Path(mine)), 3)
    refusal = said("push", "area", "--to", url, "--registry", mine, code=7)
    key = refusal.rsplit("trust ", 1)[1].split("`")[0]
    assert key == Registry(Path(mine)).objects.keys.public()
    assert "are accepted" in said("trust", key, "--registry", str(registry.root))
    assert "area@2" in said("push", "area", "--to", url, "--registry", mine)
    assert "area@prod is sha256:" in said("alias", "area", "prod", "1", "--registry", url)
    assert json.loads(said("alias", "area", "--registry", url)) == {"prod": registry.resolve("area@1")}
    assert "now serves version 3" in said("rollback", "area", "prod", "--registry", url)
    assert json.loads(said("show", "area@prod", "--registry", url))["number"] == 3
    assert [row["action"] for row in json.loads(said("history", "area", "--registry", url))] == ["publish", "push", "rollback"]
    said("export", "area@2", str(tmp_path / "out"), "--registry", url)
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert "has no version" in said("show", "verb", "--registry", url, code=6)
    assert "no registry there" in said("verify", "--registry", url, code=6)
    assert "is no address" in said("show", "area", "--registry", "grpc://nowhere", code=3)
    watching = subprocess.Popen(
        [sys.executable, "-m", "fedpeft", "adapters", "watch", "--from-start", "--registry", url], stdout=subprocess.PIPE, text=True
    )
    lines = [watching.stdout.readline() for _ in range(4)]  # type: ignore[union-attr]
    watching.kill()
    watching.communicate()
    assert [line.split(" ")[0] for line in lines] == ["area@1", "area@2", "area@3", "area@prod"]


FEDERATION = 'name = "demo"\nstate = "state"\n[control]\nport = {port}\n[tasks.colour]\nkind = "classification"\nlabels = ["a", "b"]\n'


def test_beside_the_rounds_it_is_watched_over_and_tells_of_them(tmp_path: Path, free_port: int) -> None:
    from fedpeft_coordinator.config import load_federation
    from fedpeft_coordinator.events import Events
    from fedpeft_coordinator.journal import Journal
    from fedpeft_coordinator.up import controlled

    (tmp_path / "federation.toml").write_text(FEDERATION.format(port=free_port))
    config, told = load_federation(tmp_path / "federation.toml"), []
    events = Events(config.state / "events.jsonl", [told.append])
    with controlled(config, events):
        federation = RemoteFederation(Link(Address("127.0.0.1", free_port)))
        wait_until_up(federation)
        Journal(config.database_url)
        assert (federation.status().federation, federation.status().step) == ("demo", "waiting for sites")
        watched = federation.events(follow=True)
        first = next(watched)
        assert (first.event, json.loads(first.facts)["pid"]) == ("control", told[0]["pid"])
        os.kill(told[0]["pid"], signal.SIGKILL)
        events("round", round=1)
        names = [next(watched).event for _ in range(2)]
        assert set(names) <= {"control", "round"}, "the stream goes on after the process was started again"
        watched.close()
    assert [row["event"] for row in told].count("control") == 3


def wait_until_up(federation: RemoteFederation) -> None:
    """Until the child listens; it has nothing to tell before the first round."""
    end = time.monotonic() + 60
    while True:
        try:
            federation.status()
        except StorageError as fault:
            assert "nothing ran here yet" in str(fault)  # noqa: PT017 - any other error is a failure
            return
        except LinkError:
            assert time.monotonic() < end
            time.sleep(0.3)
