"""The site's own record of what left it: one JSON line per answered task, never a row of data."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedpeft.errors import StorageError
from fedpeft.wire.v1.federation_pb2 import Masking, TaskPlan

LIMIT_BYTES = 16_000_000


@dataclass(frozen=True)
class Departure:
    """What one answer carried away: values and bytes per role, names of counters, weight, digest of the answer.

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


def masked_step(task: TaskPlan) -> str:
    """The step and the masked sum of an answer to ``task``; empty in the clear."""
    step = Masking.Step.Name(task.masking.step).removeprefix("STEP_").lower() if task.masking.step in Masking.Step.values() else "unknown"
    return f"{step} {task.masking.name}" if task.HasField("masking") else ""
