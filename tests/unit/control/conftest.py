"""A real server on loopback with port 0, on an event loop of its own, and what it takes to call it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases.spec import HeadSpec
from fedpeft.control import files
from fedpeft.control.address import Address, Identity
from fedpeft.control.cache import Cache
from fedpeft.control.channel import OPTIONS
from fedpeft.control.client import RemoteRegistry
from fedpeft.control.link import Link
from fedpeft.issuing import issue
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import Card
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.v1.registry_pb2 import Chunk
from fedpeft.v1.registry_pb2_grpc import RegistryStub
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.control.serve import Server
from fedpeft_coordinator.listening import Tls

BASE = "f" * 64


def adapter(seed: int, task: str = "area", width: int = 6) -> Adapter:
    """A LoRA adapter with random values; ``width`` makes it large."""
    layout = Layout.of(
        [Entry("A", "base_model.model.q.lora_A.weight", (2, width)), Entry("B", "base_model.model.q.lora_B.weight", (width, 2))]
    )
    spec = AdapterSpec(task, BASE, "minilm", METHODS["lora"](r=2, alpha=2.0), HeadSpec("lm"), layout)  # type: ignore[call-arg]
    return Adapter(spec, Tensors(layout, np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)))


def fill(registry: Registry, *seeds: int, task: str = "area", width: int = 6) -> list[Any]:
    """Publish an adapter for each seed, with a card that points along axis ``seed``."""
    cards = {seed: Card(tuple(np.eye(8)[seed % 8].tolist()), 0.5, 10).to_json() for seed in seeds}
    return [registry.publish(adapter(seed, task, width), Manifest(round=seed, card=cards[seed]), f"run/{seed}/{task}") for seed in seeds]


def chunk(data: bytes, offset: int) -> Chunk:
    """``data`` at ``offset`` of a stream."""
    part = Chunk()
    files.fill(part, data, offset)
    return part


@dataclass
class Running:
    """A server, its registry, and the port that it listens on."""

    server: Server
    registry: Registry
    port: int
    loop: asyncio.AbstractEventLoop

    def link(self, identity: Identity | None = None, host: str = "127.0.0.1") -> Link:
        return Link(Address(host, self.port), identity)

    def far(self, folder: Path, identity: Identity | None = None, host: str = "127.0.0.1") -> RemoteRegistry:
        return RemoteRegistry(self.link(identity, host), Cache(folder))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """``serve(registry, **settings)``: a running server; all are ended after the test."""
    with ExitStack() as stack:

        def start(registry: Registry | None = None, texts: Any = None, record: Any = lambda *_a, **_k: None, **settings: Any) -> Running:
            registry = registry or Registry(tmp_path / "registry")
            control = Control(**{"port": 0, "poll": 0.05, "embed": False, **settings})
            server = Server(registry, control, tmp_path / "state", texts=texts, record=record)
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, daemon=True)
            thread.start()
            port = asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)

            def stop() -> None:
                asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
                loop.call_soon_threadsafe(loop.stop)
                thread.join(10)
                loop.close()

            stack.callback(stop)
            return Running(server, registry, port, loop)

        yield start


@pytest.fixture(scope="session")
def made() -> Any:
    """The helpers `adapter`, `fill` and `chunk`."""
    return type("Made", (), {"adapter": staticmethod(adapter), "fill": staticmethod(fill), "chunk": staticmethod(chunk), "base": BASE})


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of certificates that `fedpeft certificates` made: every role, and a second CA's."""
    folder = tmp_path_factory.mktemp("certs")
    roles = ["reader:ann", "site:clinic", "publisher:trainer", "monitor:grafana", "operator:root"]
    issue(folder / "ours", ["localhost", "127.0.0.1"], [], roles, 30, ["reader:phone", "publisher:robot"])
    issue(folder / "other", ["elsewhere.example.org"], [], ["operator:eve"], 30)
    return folder


@pytest.fixture
def secure(serve: Callable[..., Running], certificates: Path) -> Running:
    """A server under mutual TLS with two versions of one task."""
    ours = certificates / "ours"
    running = serve(tls=Tls(ca=ours / "ca.crt", cert=ours / "server.pem", key=ours / "server.key"))
    fill(running.registry, 1, 2)
    return running


@pytest.fixture
def running(serve: Callable[..., Running]) -> Running:
    """A server with two versions of one task."""
    found = serve()
    fill(found.registry, 1, 2)
    return found


@pytest.fixture
def far(running: Running, tmp_path: Path) -> Iterator[RemoteRegistry]:
    one = running.far(tmp_path / "cache")
    with one.link:
        yield one


@pytest.fixture
def stub(running: Running) -> Iterator[RegistryStub]:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", OPTIONS) as channel:
        yield RegistryStub(channel)


@pytest.fixture
def other(running: Running, tmp_path: Path) -> Registry:
    """Another registry, which the server trusts, with one large version."""
    found = Registry(tmp_path / "other")
    fill(found, 5, width=300_000)
    running.registry.objects.keys.trust(found.objects.keys.public())
    return found
