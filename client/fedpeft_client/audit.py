"""The site's own record of what left it: one JSON line per answered task, never a row of data."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from fedpeft.errors import StorageError
from fedpeft.wire.v1.federation_pb2 import Masking, TaskPlan

LIMIT_BYTES = 16_000_000


@dataclass(frozen=True)
class Departure:
    """What one answer carried away: bytes of values per role and of everything, names of counters, weight, digest of the answer.

    ``masked`` names the masked sum that values, weight and counters went into, and the step; empty: they left in the clear.
    ``protected`` says how they were bounded and noised; ``epsilon`` is what the task had spent at this site with this answer.
    """

    federation: str
    round: int
    kind: str
    task: str
    outcome: str
    tensors: dict[str, int] = field(default_factory=dict)
    counters: tuple[str, ...] = ()
    weight: float = 0.0
    bytes: int = 0
    digest: str = ""
    repeated: bool = False
    masked: str = ""
    protected: str = ""
    epsilon: float | None = None


def record(path: Path, departure: Departure) -> None:
    """Append ``departure`` with the time (UTC) to ``path``; past 16 MB the file moves to ``.1``. Raises `StorageError`."""
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(departure)}, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LIMIT_BYTES:
            path.replace(path.with_suffix(path.suffix + ".1"))
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        raise StorageError(f"{path}: the audit log cannot be written: {fault.strerror}; nothing leaves this site without it") from None


def read(path: Path) -> list[dict[str, Any]]:
    """What `record` wrote to ``path`` and to the file before it, oldest first; a line that was torn by a crash is passed over."""
    found = []
    for file in (path.with_suffix(path.suffix + ".1"), path):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def sent_today(path: Path, today: date) -> int:
    """Bytes that left on ``today`` (UTC)."""
    return sum(one.get("bytes", 0) for one in read(path) if str(one.get("time", "")).startswith(today.isoformat()))


def masked_step(task: TaskPlan) -> str:
    """The step and the masked sum of an answer to ``task``; empty in the clear."""
    step = Masking.Step.Name(task.masking.step).removeprefix("STEP_").lower() if task.masking.step in Masking.Step.values() else "unknown"
    return f"{step} {task.masking.name}" if task.HasField("masking") else ""
