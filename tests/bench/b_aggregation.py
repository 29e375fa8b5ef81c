"""B1, B2: the weighted mean of many sites' updates from received bytes, ours and flwr's, in CPU time and in memory.

Peer: flwr's ``aggregate_arrayrecords`` over replies of 448 float32 arrays each, which is what its strategies call. Ours: the int32
codes of the wire, summed by `fedpeft.schemes.Sum` with bound, layout and grid checks, then the mean. Both start from bytes
and end with float32 values; one thread, interleaved in one process, least CPU time. The floor is one read of all received bytes,
``limit`` the ratio that it would reach.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench._common import aggregate, flat_of, layout_of, least, reply, row_of

from fedpeft.schemes import Sum
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Grid, Update

ARRAYS = 448
SPEED = ((20, 22_321, 10.0), (50, 8_928, 20.0))
"""Clients, values per array (448 arrays: 10.0 M and 4.0 M values), goal."""
CLIENTS, MEMORY_SIZE = (10, 40), 8_928


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows B1 (CPU seconds) and B2 (MiB of peak resident memory above import)."""
    return [row for clients, size, goal in SPEED for row in _speed(clients, size, goal, repeats)] + _memory()


def _speed(clients: int, size: int, goal: float, repeats: int) -> list[dict[str, object]]:
    layout, grid, rng = layout_of(ARRAYS, size), Grid(clients), np.random.default_rng(0)
    weights = [round(w * 2**20) / 2**20 for w in rng.uniform(0.2, 1.0, clients)]
    codes, replies = [], []
    for weight in weights:
        delta = Tensors(layout, rng.standard_normal(layout.size, np.float32) * np.float32(1e-3))
        codes.append(Update.encode(delta, weight, {}, grid).codes.tobytes())
        replies.append(reply(delta, weight))
    contenders: dict[str, Callable[[], Any]] = {
        "peer": lambda: aggregate(replies),
        "one at a time": lambda: _ours(layout, grid, codes, weights, 1),
        "by fours": lambda: _ours(layout, grid, codes, weights, 4),
        "floor": lambda: [np.frombuffer(data, np.int32).max() for data in codes],
    }
    _same(contenders["by fours"]().flat, contenders["peer"](), grid, weights)
    seconds = least(contenders, repeats)
    case = f"fedavg_stream {clients} x {layout.size / 1e6:.1f}M"
    return [row_of("B1", f"{case}, {name}", seconds, name, f"ratio >= {goal:.0f}") for name in ("one at a time", "by fours")]


def _ours(layout: Layout, grid: Grid, received: list[bytes], weights: list[float], together: int) -> Tensors:
    total = Sum(layout, grid)
    for start in range(0, len(received), together):
        pairs = zip(received[start : start + together], weights[start : start + together], strict=True)
        total.add(*(Update(layout, grid, np.frombuffer(data, np.int32), weight) for data, weight in pairs))
    return total.result().mean()


def _same(ours: Any, peer: Any, grid: Grid, weights: list[float]) -> None:
    allowed = 0.5 * grid.step * len(weights) / sum(weights) + 1e-8
    if (worst := float(np.abs(ours - flat_of(peer)).max())) > allowed:
        raise AssertionError(f"ours and the peer's mean differ by {worst}, the grid allows {allowed}")


def _memory() -> list[dict[str, object]]:
    """Both sides in a process of their own, each reply read from a file as it would arrive from a socket."""
    with tempfile.TemporaryDirectory() as folder:
        _write_messages(Path(folder))
        peaks = {(side, count): _child(side, count, folder) for side in ("ours", "peer") for count in CLIENTS}
    rows = []
    for count in CLIENTS:
        ours, peer = peaks["ours", count], peaks["peer", count]
        flat = peaks["ours", CLIENTS[-1]] / peaks["ours", CLIENTS[0]]
        rows.append(
            {
                "row": "B2",
                "case": f"fedavg_memory N={count} P={ARRAYS * MEMORY_SIZE / 1e6:.1f}M",
                "ours": ours,
                "peer": peer,
                "ratio": peer / ours,
                "growth": flat,
                "goal": f"ratio >= {count / 4:.1f}, flat in N",
                "held": peer / ours >= count / 4 and flat < 1.1,
                "unit": "MiB peak above import",
            }
        )
    return rows


def _write_messages(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "ours").write_bytes(rng.integers(-1000, 1000, ARRAYS * MEMORY_SIZE, np.int32).tobytes())
    with open(folder / "peer", "wb") as stream:
        for _ in range(ARRAYS):
            np.save(stream, rng.standard_normal(MEMORY_SIZE, np.float32))


def _child(side: str, count: int, folder: str) -> float:
    command = [sys.executable, "-m", "tests.bench.b_aggregation", side, str(count), folder]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(answer.stdout)


def _measure(side: str, count: int, folder: Path) -> float:
    """MiB between the resident memory after import and the peak. ``ru_maxrss`` would carry the parent's peak over."""
    if side == "peer":
        import flwr.serverapp.strategy.strategy_utils  # noqa: F401 - imported before the first reading
    before = _status("VmRSS")
    if side == "peer":
        aggregate([_received(folder / "peer") for _ in range(count)])
    else:
        layout, grid = layout_of(ARRAYS, MEMORY_SIZE), Grid(count)
        total = Sum(layout, grid)
        for data in _messages(folder / "ours", count):
            total.add(Update(layout, grid, np.frombuffer(data, np.int32), 1.0))
        total.result().mean()
    return (_status("VmHWM") - before) / 1024


def _messages(path: Path, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield path.read_bytes()


def _received(path: Path) -> Any:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    blank = BytesIO()
    np.save(blank, np.zeros(MEMORY_SIZE, np.float32))
    length = len(blank.getvalue())
    with open(path, "rb") as stream:
        arrays = {str(place): Array("float32", (MEMORY_SIZE,), "numpy.ndarray", stream.read(length)) for place in range(ARRAYS)}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"weight": 1.0})})


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(_measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
    else:
        for row in run():
            print(row)
