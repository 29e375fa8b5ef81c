"""What a site has signed, for ever: a line for each mark, on disk before the signature leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpeft.errors import StorageError
from fedpeft.files import sync_folder, write_synced

END = "."


@dataclass(frozen=True)
class Marks:
    """Values by key, neither of which holds white space; a key keeps its first value."""

    path: Path

    def clash(self, marks: Mapping[str, str]) -> str | None:
        """A key of ``marks`` that has another value, or None. Raises `StorageError`."""
        return next((key for key, value in marks.items() if self._all.get(key, value) != value), None)

    def add(self, marks: Mapping[str, str]) -> None:
        """Remember ``marks``, which clash with nothing. Raises `StorageError`."""
        fresh = {key: value for key, value in marks.items() if key not in self._all}
        if not fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                write_synced(handle, "".join(f"\n{key} {value} {END}" for key, value in fresh.items()).encode())
            finally:
                os.close(handle)
            sync_folder(self.path.parent)
        except OSError as fault:
            raise StorageError(f"{self.path}: cannot be written: {fault.strerror}; without it this site signs nothing") from None
        self._all.update(fresh)

    @cached_property
    def _all(self) -> dict[str, str]:
        """The file; a line cut by a crash, whose signature never left, has no end and spoils no other, as each begins with its break."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as fault:
            raise StorageError(f"{self.path}: cannot be read: {fault.strerror}; without it this site signs nothing") from None
        return dict(reversed([(mark[0], mark[1]) for line in lines if len(mark := line.split()) == 3 and mark[2] == END]))
