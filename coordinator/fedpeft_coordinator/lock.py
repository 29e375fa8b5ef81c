"""One coordinator per state folder: a file lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.errors import StorageError

NAME = "coordinator.lock"


@contextmanager
def held(state: Path) -> Iterator[None]:
    """Hold the lock of ``state``. Raises `StorageError` when another coordinator holds it, naming its process id."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        handle = os.open(state / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as fault:
        raise StorageError(f"{state}: cannot be written: {fault.strerror}; check the path and its permissions") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    except BlockingIOError:
        raise StorageError(
            f"{state}: coordinator process {_pid(state)} is running on it; stop it, or give this federation another `state`"
        ) from None
    finally:
        os.close(handle)


def holder(state: Path) -> int | None:
    """The process id of the coordinator that runs on ``state`` now, or None."""
    try:
        handle = os.open(state / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _pid(state)
    finally:
        os.close(handle)


def _pid(state: Path) -> int | None:
    text = (state / NAME).read_text(encoding="ascii", errors="replace").strip()
    return int(text) if text.isdigit() else None
