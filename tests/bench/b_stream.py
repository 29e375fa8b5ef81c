"""B1s, B2s: the sum of 100 sites' updates of 10 M values as they stream by, in CPU time and in memory.

Ours: int32 codes, checked and added by `fedpeft.schemes.Sum`, then the mean. Peer: flwr's ``aggregate_arrayrecords`` over 100
replies of 448 float32 arrays. ``floor`` is a bare in-place add of the same bytes, without any check. The messages are passes over
four buffers, which no cache holds. Memory: each message is read from a file and dropped, as from a socket.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tests.bench._common import aggregate, layout_of, least, reply, row_of

from fedpeft.schemes import Sum
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Codes, Grid, Update

ARRAYS, SIZE, CLIENTS, BUFFERS = 448, 22_321, 100, 4
MESSAGES = (10, 100)


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows B1s (CPU seconds; one repeat of the peer takes seconds, so three at most) and B2s (MiB)."""
    return [*_speed(min(repeats, 3)), *_memory()]


def _speed(repeats: int) -> list[dict[str, object]]:
    layout, grid, rng = layout_of(ARRAYS, SIZE), Grid(CLIENTS), np.random.default_rng(0)
    deltas = [Tensors(layout, rng.standard_normal(layout.size, np.float32) * np.float32(1e-3)) for _ in range(BUFFERS)]
    codes = [Update.encode(delta, 1.0, {}, grid).codes for delta in deltas]
    replies = [reply(delta, 1.0) for delta in deltas]
    bare = np.zeros(layout.size, np.int32)
    contenders = {
        "peer": lambda: aggregate(replies * (CLIENTS // BUFFERS)),
        "one at a time": lambda: _sum(layout, grid, codes, 1),
        "by fours": lambda: _sum(layout, grid, codes, 4),
        "floor": lambda: _add(bare, codes),
    }
    seconds = least(contenders, repeats)
    case = f"fedavg_stream {CLIENTS} x {layout.size / 1e6:.1f}M over a bare add"
    return [row_of("B1s", f"{case}, {name}", seconds, name) for name in ("one at a time", "by fours")]


def _sum(layout: Layout, grid: Grid, codes: list[Codes], together: int) -> Tensors:
    total = Sum(layout, grid)
    for start in range(0, CLIENTS, together):
        total.add(*(Update(layout, grid, codes[place % BUFFERS], 1.0) for place in range(start, start + together)))
    return total.result().mean()


def _add(total: Codes, codes: list[Codes]) -> None:
    for place in range(CLIENTS):
        np.add(total, codes[place % BUFFERS], out=total)


def _memory() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "message"
        path.write_bytes(np.random.default_rng(0).integers(-1000, 1000, ARRAYS * SIZE, np.int32).tobytes())
        peaks = [_child(count, path) for count in MESSAGES]
    return [
        {
            "row": "B2s",
            "case": f"fedavg_memory N={count} P={ARRAYS * SIZE / 1e6:.1f}M ({peak / (ARRAYS * SIZE * 4 / 2**20):.1f} vectors)",
            "ours": peak,
            "growth": peak / peaks[0],
            "held": peak < 1.1 * peaks[0],
            "unit": "MiB peak above import",
        }
        for count, peak in zip(MESSAGES, peaks, strict=True)
    ]


def _child(count: int, path: Path) -> float:
    command = [sys.executable, "-m", "tests.bench.b_stream", str(count), str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(answer.stdout)


def _measure(count: int, path: Path) -> float:
    before = _status("VmRSS")
    layout, grid = layout_of(ARRAYS, SIZE), Grid(count)
    total = Sum(layout, grid)
    for _ in range(count):
        total.add(Update(layout, grid, np.frombuffer(path.read_bytes(), np.int32), 1.0))
    total.result().mean()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    print(_measure(int(sys.argv[1]), Path(sys.argv[2])))
