"""The worker's sign of life: a small file that says what it does and when it last got on; the watchdog reads it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EVERY_SECONDS = 0.5
MESSAGE = "a message"
"""What a worker is busy with before it knows what for."""


@dataclass(frozen=True)
class Sign:
    """``busy`` is what the worker does (empty: it waits), ``beat`` the monotonic time (machine-wide) of its last progress.

    ``faults`` are why tasks were not answered when last asked for, by task.
    """

    pid: int
    busy: str = ""
    step: int = 0
    beat: float = 0.0
    base_loads: int = 0
    answered: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)


class Pulse:
    """Writes `Sign`s of this process to ``path``, at most two a second while one job goes on; a full disk is no fault."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sign = Sign(os.getpid())
        self._written = 0.0

    def progress(self, busy: str, step: int) -> None:
        """The worker got on with ``busy``."""
        changed = busy != self.sign.busy
        self._set(busy=busy, step=step)
        if changed or time.monotonic() - self._written >= EVERY_SECONDS:
            self.write()

    def idle(self, answered: int = 0, base_loads: int = 0, faults: Mapping[str, str] | None = None) -> None:
        """The worker waits for work."""
        counts = {"answered": self.sign.answered + answered, "base_loads": base_loads or self.sign.base_loads}
        self._set(busy="", step=0, faults=dict(faults or {}), **counts)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        self._written = time.monotonic()
        new = self.path.with_suffix(".new")
        with suppress(OSError):
            new.write_text(json.dumps(asdict(self.sign)), encoding="utf-8")
            new.replace(self.path)

    def _set(self, **changes: Any) -> None:
        self.sign = Sign(**{**asdict(self.sign), **changes, "beat": time.monotonic()})


def read(path: Path) -> Sign | None:
    """The last sign, or None when there is none that can be read."""
    try:
        return Sign(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def busy(path: Path, pid: int) -> bool:
    """Whether process ``pid`` is, or was when it died, in the middle of a job."""
    sign = read(path)
    return sign is not None and sign.pid == pid and bool(sign.busy)


def hung(path: Path, limit: float, pid: int) -> str | None:
    """Why process ``pid`` counts as hung: busy without progress for ``limit`` seconds; None when it does not."""
    sign = read(path)
    if sign is None or not busy(path, pid):
        return None
    silent = time.monotonic() - sign.beat
    return f"no progress with {sign.busy!r} for {silent:.0f} s (watchdog_seconds = {limit:g})" if silent > limit else None
