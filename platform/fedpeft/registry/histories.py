"""Where histories lie: named lists of lines that only grow, each line at the place that its writer expected or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedpeft.files import sync_folder
from fedpeft.registry import disk


class Histories(Protocol):
    """Named lists of lines (bytes without a newline)."""

    def where(self, name: str) -> str:
        """The list ``name`` for people."""
        ...

    def lines(self, name: str) -> list[bytes]:
        """All lines, oldest first; none where there is no such list. Raises `StorageError`."""
        ...

    def append(self, name: str, count: int, line: bytes) -> bool:
        """Compare and swap: add ``line`` durably as line ``count`` (from 0); False when the list has no longer ``count`` lines.

        Raises:
            StorageError: it could not be written; the list is as it was.
        """
        ...

    def names(self) -> tuple[str, ...]:
        """All lists. Raises `StorageError`."""
        ...

    def stamp(self) -> object:
        """A value that differs once anything was appended; cheap. Raises `StorageError`."""
        ...


@dataclass(frozen=True)
class FileHistories:
    """One file for each list, in the folder ``root``.

    A line that lacks its newline is one that a dying process did not finish: it never happened, and the next append cuts it off.
    """

    root: Path

    def path(self, name: str) -> Path:
        """The file of list ``name``."""
        return self.root / name

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.path(name))

    def lines(self, name: str) -> list[bytes]:
        """Readers take no lock: a line appears by one write."""
        path = self.path(name)
        return disk.read(path).split(b"\n")[:-1] if path.exists() else []

    def append(self, name: str, count: int, line: bytes) -> bool:
        """Under the writer lock, fsynced."""
        path = self.path(name)
        with disk.writing(self.root):
            data = path.read_bytes() if path.exists() else b""
            if data.count(b"\n") != count:
                return False
            fresh = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, data.rfind(b"\n") + 1, line + b"\n")
            if fresh:
                for folder in path.parents[:3]:
                    sync_folder(folder)
            return True

    def names(self) -> tuple[str, ...]:
        """Files two folders down."""
        return tuple(sorted(str(path.relative_to(self.root)) for path in self.root.glob("refs/*/*") if path.is_file()))

    def stamp(self) -> object:
        """Sizes of all files."""
        return tuple((name, self.path(name).stat().st_size) for name in self.names())


def _append(path: Path, end: int, data: bytes) -> None:
    with open(path, "ab", buffering=0) as stream:
        os.ftruncate(stream.fileno(), end)
        try:
            while data:
                data = data[os.write(stream.fileno(), data) :]
            os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), end)
            raise
