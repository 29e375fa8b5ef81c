"""H: pulls and pushes of versions over the control plane beside a plain file copy over loopback.

Two processes on loopback, as in use. Floor: the same bytes through a raw socket (``sendall`` and ``recv_into``), read from a file and
thrown away. Peer: the same, written to a file. Ours: `stream` throws the chunks away as the floor does; `pull` and `push` do all that is
promised: CRC-32, SHA-256, signature, fsync, and for a push the judge. CPU seconds of both ends, least over interleaved repeats; the
wall clock's speed stands in the case, for a quiet machine. Then 200 pulls at once, in one channel each of 8.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases.spec import HeadSpec
from fedpeft.control.address import Address
from fedpeft.control.cache import Cache
from fedpeft.control.client import RemoteRegistry
from fedpeft.control.link import Link
from fedpeft.methods import METHODS
from fedpeft.processes import free_port
from fedpeft.registry import Manifest, Registry
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.v1 import registry_pb2 as pb

WIDTH, SMALL, CLIENTS, CHANNELS, BUFFER = 2_000_000, 40_000, 200, 8, 1 << 20


@dataclass
class Spent:
    """Least CPU seconds of both ends, and least wall seconds."""

    cpu: float = float("inf")
    wall: float = float("inf")


def run(repeats: int = 3) -> list[dict[str, object]]:
    """Rows of CPU seconds for one version, then of 200 pulls at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry, other = Registry(folder / "registry"), Registry(folder / "other")
        version = publish(registry, 0, "large", WIDTH)
        publish(registry, 1, "small", SMALL)
        for seed in range(repeats):
            publish(other, 100 + seed, "large", WIDTH)
        registry.objects.keys.trust(other.objects.keys.public())
        sizes = registry.objects.store.sizes(version.digest)
        total = sum(sizes[file] for file in version.manifest.files)
        (folder / "plain").write_bytes(b"".join(registry.objects.store.get(version.digest, file) for file in version.manifest.files))
        with served(registry.root) as (port, pid), sending(folder / "plain") as (raw, sender):
            spent = measured(Run(folder, port, raw, version.digest, other), {"grpc": pid, "raw": sender}, repeats)
            many = together(port, registry)
    return [row(kind, spent, total) for kind in ("stream", "pull", "push")] + [many]


def row(kind: str, spent: dict[str, Spent], total: int) -> dict[str, object]:
    """Ours beside peer and floor."""
    peer = spent["push peer" if kind == "push" else "copy"]
    ours, floor = spent[kind], spent["floor"]
    speeds = ", ".join(f"{total / 1e6 / found.wall:.0f}" for found in (ours, peer, floor))
    return {
        "row": "H1",
        "case": f"{kind} {total / 1e6:.0f} MB over loopback; wall MB/s ours, copy, raw: {speeds}",
        "ours": ours.cpu,
        "peer": peer.cpu,
        "ratio": peer.cpu / ours.cpu,
        "floor": floor.cpu,
        "floor_share": floor.cpu / ours.cpu,
        "unit": "CPU s",
    }


@dataclass
class Run:
    """What the contenders work on."""

    folder: Path
    port: int
    raw: int
    digest: str
    other: Registry

    def works(self, repeat: int) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Contender -> who is at its other end, and what it does."""
        link = Link(Address("127.0.0.1", self.port))
        cache = Cache(self.folder / f"cache{repeat}")
        sink = self.folder / f"sink{repeat}"
        return {
            "floor": ("raw", lambda: receive(self.raw, None)),
            "copy": ("raw", lambda: receive(self.raw, sink)),
            "push peer": ("raw", lambda: receive(self.raw, sink, sync=True)),
            "stream": ("grpc", lambda: sum(len(part.chunk.data) for part in link.stub("Registry").Pull(pb.PullRequest(ref=self.digest)))),
            "pull": ("grpc", lambda: RemoteRegistry(link, cache).files(self.digest)),
            "push": ("grpc", lambda: RemoteRegistry(link, cache).push(self.other, f"large@{repeat + 1}")),
        }


def measured(work: Run, pids: dict[str, int], repeats: int) -> dict[str, Spent]:
    """Least times of each contender, interleaved."""
    spent: dict[str, Spent] = {}
    for repeat in range(repeats):
        for name, (end, go) in work.works(repeat).items():
            began, wall = time.process_time() + cpu_of(pids[end]), time.perf_counter()
            go()
            wall = time.perf_counter() - wall
            time.sleep(0.05)
            used = time.process_time() + cpu_of(pids[end]) - began
            best = spent.setdefault(name, Spent())
            best.cpu, best.wall = min(best.cpu, used), min(best.wall, wall)
    return spent


def together(port: int, registry: Registry) -> dict[str, object]:
    """`CLIENTS` whole pulls at once; an error would end the benchmark."""
    digest = registry.resolve("small")
    sizes = registry.objects.store.sizes(digest)
    total = sum(sizes[file] for file in registry.get(digest).manifest.files)
    wall = time.perf_counter()
    got = asyncio.run(_all(port, digest))
    wall = time.perf_counter() - wall
    errors = sum(size != total for size in got)
    return {
        "row": "H2",
        "case": f"{CLIENTS} pulls of {total / 1e6:.1f} MB at once, {CHANNELS} connections: {errors} errors",
        "ours": wall,
        "unit": "s",
        "held": not errors,
    }


async def _all(port: int, digest: str) -> list[int]:
    import grpc.aio

    from fedpeft.v1.registry_pb2_grpc import RegistryStub

    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) for _ in range(CHANNELS)]

    async def one(place: int) -> int:
        call = RegistryStub(channels[place % CHANNELS]).Pull(pb.PullRequest(ref=digest), timeout=120)
        return sum([len(part.chunk.data) async for part in call])

    found = await asyncio.gather(*(one(place) for place in range(CLIENTS)))
    for channel in channels:
        await channel.close()
    return list(found)


def publish(registry: Registry, seed: int, task: str, width: int) -> Any:
    """A LoRA version of ``width`` times 16 bytes and its router card."""
    layout = Layout.of(
        [Entry("A", "base_model.model.q.lora_A.weight", (2, width)), Entry("B", "base_model.model.q.lora_B.weight", (width, 2))]
    )
    spec = AdapterSpec(task, "f" * 64, "minilm", METHODS["lora"](r=2, alpha=2.0), HeadSpec("lm"), layout)  # type: ignore[call-arg]
    values = np.random.default_rng(seed).standard_normal(layout.size, np.float32)
    return registry.publish(Adapter(spec, Tensors(layout, values)), Manifest(round=seed), str(seed))


@contextmanager
def served(folder: Path) -> Iterator[tuple[int, int]]:
    """`fedpeft coordinator serve` on ``folder``: port and process id."""
    port = free_port()
    command = [sys.executable, "-m", "fedpeft", "coordinator", "serve", str(folder), "--set", f"port={port}", "--set", "embed=false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def sending(path: Path) -> Iterator[tuple[int, int]]:
    """A process that sends ``path`` to everybody who connects: port and process id."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=_send, args=(listener, path), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1], process.pid or 0
        finally:
            process.terminate()
            process.join()


def _send(listener: socket.socket, path: Path) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, path.open("rb") as file:
            while block := file.read(BUFFER):
                connection.sendall(block)


def receive(port: int, path: Path | None, sync: bool = False) -> int:
    """All that comes, thrown away or written to ``path`` (and to the disk, with ``sync``); returns the bytes."""
    buffer, total = bytearray(BUFFER), 0
    with socket.create_connection(("127.0.0.1", port)) as connection, open(path or os.devnull, "wb", buffering=0) as file:
        while got := connection.recv_into(buffer):
            total += got
            if path is not None:
                file.write(memoryview(buffer)[:got])
        if sync:
            os.fsync(file.fileno())
    return total


def cpu_of(pid: int) -> float:
    """CPU seconds that process ``pid`` used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
