"""Durable files: written whole or not at all, and still there after a power cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpeft.errors import StorageError


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a crash, sees the old file or the new one.

    Raises:
        StorageError: no space or no permission; the old file stays and nothing is left behind.
    """
    with _beside(path, data, mode) as temporary:
        temporary.replace(path)


def write_new(path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Make ``path`` with ``data`` where there is no such file, whole; whether it was made. Raises as `write_atomic` does."""
    with _beside(path, data, mode) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
    return True


@contextmanager
def _beside(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """A synced temporary file with ``data`` beside ``path``; whatever is made of it inside is synced too."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(handle, mode)
            write_synced(stream.fileno(), data)
        yield temporary
        sync_folder(path.parent)
    except OSError as fault:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise StorageError(f"{path}: cannot be written: {fault.strerror or fault}; free space or choose another place") from None


def write_synced(handle: int, data: bytes) -> None:
    """Write all of ``data`` to an open file and wait until the disk has it. Raises `OSError`."""
    write_all(handle, data)
    os.fsync(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write all of ``data`` to an open file. Raises `OSError`."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Make names that were made or renamed in ``folder`` survive a power cut. Raises `OSError`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
