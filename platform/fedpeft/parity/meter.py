"""What an arm costs this machine: seconds, and the most memory that one of its processes held, kept over interruptions."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpeft.files import write_atomic

EVERY_SECONDS = 0.5
PROC = Path("/proc")


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, and bytes of host memory (resident set) of the largest process; None where the system does not tell."""

    seconds: float = 0.0
    peak_bytes: int | None = None

    def and_then(self, seconds: float, peak: int | None) -> Cost:
        """This cost with another stretch after it."""
        return Cost(self.seconds + seconds, max(self.peak_bytes or 0, peak or 0) or None)


def read(path: Path) -> Cost:
    """What was measured into ``path`` so far; nothing where there is no such file, or it is torn."""
    try:
        return Cost(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Cost()


@contextmanager
def metered(path: Path) -> Iterator[None]:
    """Add what is spent within to ``path``, twice a second, so that little is lost when this process is killed.

    All processes that descend from this one count; two arms are not measured at once. Raises `StorageError`.
    """
    before, began, stop = read(path), time.monotonic(), threading.Event()
    peak: list[int] = [0]

    def note() -> None:
        peak[0] = max(peak[0], highest(os.getpid()))
        cost = before.and_then(time.monotonic() - began, peak[0])
        write_atomic(path, json.dumps({"seconds": cost.seconds, "peak_bytes": cost.peak_bytes}).encode())

    def watch() -> None:
        while not stop.wait(EVERY_SECONDS):
            note()

    thread = threading.Thread(target=watch, name="meter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        note()


def highest(ancestor: int) -> int:
    """The largest resident set in bytes that a living descendant of process ``ancestor`` ever had (VmHWM); 0 where there is none."""
    return max((_high_water(pid) for pid in descendants(ancestor)), default=0)


def descendants(ancestor: int) -> list[int]:
    """Ids of the living processes below ``ancestor``."""
    children: dict[int, list[int]] = defaultdict(list)
    for pid, parent in _parents():
        children[parent].append(pid)
    found, open_ = [], [ancestor]
    while open_:
        below = children[open_.pop()]
        found += below
        open_ += below
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for folder in PROC.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        yield int(folder.name), int(fields[1])


def _high_water(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
