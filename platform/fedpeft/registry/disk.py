"""Durable small files: written whole or not at all, one writer at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.errors import StorageError


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the registry's writer lock; other processes and threads wait. The kernel drops it when the holder dies.

    Raises:
        StorageError: anything inside could not be written: no space, no permission, a broken disk.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".lock", "ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
    except OSError as fault:
        where = fault.filename or root
        raise StorageError(f"{where}: cannot be written: {fault.strerror or fault}; free space or check permissions, then go on") from None


def read(path: Path) -> bytes:
    """The bytes of ``path``. Raises `StorageError` when it is missing or unreadable."""
    try:
        return path.read_bytes()
    except OSError as fault:
        raise StorageError(f"{path}: cannot be read: {fault.strerror or fault}; run `fedpeft adapters verify`") from None
