"""One coordinator per state folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from fedpeft import locks

NAME = "coordinator.lock"


def held(state: Path) -> AbstractContextManager[None]:
    """Hold the lock of ``state``. Raises `StorageError` when another coordinator holds it, naming its process id."""
    return locks.held(state / NAME, "runs a coordinator on it", "give this federation another `state`")


def holder(state: Path) -> int | None:
    """The process id of the coordinator that runs on ``state`` now, or None."""
    return locks.holder(state / NAME)
