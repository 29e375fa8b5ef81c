"""Events: one JSON line per thing that happened, for progress displays and for people. Never read back by the rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.errors import StorageError

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Events:
    """Appends to ``path`` and tells the listeners. ``path`` None keeps nothing."""

    path: Path | None = None
    listeners: list[Listener] = field(default_factory=list)

    def __call__(self, event: str, **facts: Any) -> None:
        """Record ``event``. Raises `StorageError` when the file cannot be written."""
        row = {"time": round(time.time(), 3), "event": event, **facts}
        if self.path is not None:
            self._append(self.path, json.dumps(row))
        for listener in self.listeners:
            listener(row)

    def _append(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as fault:
            raise StorageError(f"{path}: cannot be written: {fault.strerror}; free space, then run the same command again") from None


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of ``path``, oldest first; a line cut by a crash is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                yield json.loads(text)
            except ValueError:
                continue
