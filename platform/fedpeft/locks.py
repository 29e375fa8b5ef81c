"""One process at a time in a folder: a file lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpeft.errors import StorageError

NAME = ".lock"


@contextmanager
def held(path: Path, does: str, instead: str, mode: int = 0o777) -> Iterator[None]:
    """Hold the file ``path``, made where it is not there, until the block is left; a folder that is made for it gets ``mode``.

    Raises:
        StorageError: it cannot be written; or another process holds it: which one, that it ``does`` this there, and what to do ``instead``.
    """
    try:
        path.parent.mkdir(mode, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as fault:
        raise StorageError(f"{path}: cannot be written: {fault.strerror}; check the path and its permissions") from None
    try:
        _take(handle, path, does, instead)
        yield
    finally:
        os.close(handle)


def holder(path: Path) -> int | None:
    """The id of the process that holds ``path`` now; None where none does."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _written(path)
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Delete all of ``folder`` but its lock, since who deletes a lock no longer holds it. Raises `OSError`."""
    for path in folder.iterdir():
        if path.name != NAME:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _take(handle: int, path: Path, does: str, instead: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"{path.parent}: process {_written(path) or 'unknown'} {does}; stop it, or {instead}") from None
    with suppress(OSError):  # no space for its id: the lock holds without
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())


def _written(path: Path) -> int | None:
    text = path.read_text(encoding="ascii", errors="replace").strip()
    return int(text) if text.isdigit() else None
