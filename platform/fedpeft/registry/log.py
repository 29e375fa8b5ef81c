"""A task's history: one JSON line per event, each carrying the hash of the line before."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

from fedpeft.errors import StorageError
from fedpeft.registry.manifest import sha256

START = "0" * 64
DIGEST = re.compile(r"[0-9a-f]{64}")
Action = Literal["publish", "rollback", "pull", "push"]


@dataclass(frozen=True)
class Entry:
    """One event: from now on, number ``number`` of the task is version ``digest``; ``created`` (UTC) is for people only."""

    number: int
    action: Action
    digest: str
    origin: str
    created: str
    previous: str = START

    @property
    def hash(self) -> str:
        """SHA-256 over the event and the hash of the one before."""
        return sha256(json.dumps(vars(self), sort_keys=True, separators=(",", ":")).encode())

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        return {**vars(self), "hash": self.hash}

    def to_line(self) -> bytes:
        """What a history holds; `parse` reads it back."""
        return json.dumps(self.to_json(), sort_keys=True).encode()


def parse(lines: Sequence[bytes], where: str) -> tuple[Entry, ...]:
    """The events of a history, oldest first.

    Raises:
        StorageError: a line is malformed, or its hash or number breaks the chain; ``where`` and the line are named.
    """
    entries: list[Entry] = []
    for line in lines:
        entry = _parse(line)
        before = entries[-1].hash if entries else START
        if entry is None or entry.previous != before or entry.number != len(entries) + 1:
            raise StorageError(f"{where}: line {len(entries) + 1} was changed or is out of order; restore the file from a backup")
        entries.append(entry)
    return tuple(entries)


def follow(entries: Sequence[Entry], action: Action, digest: str, origin: str) -> Entry:
    """The event that comes after ``entries``."""
    return Entry(len(entries) + 1, action, digest, origin, now(), entries[-1].hash if entries else START)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parse(line: bytes) -> Entry | None:
    try:
        table = json.loads(line)
        mark = table.pop("hash")
        entry = Entry(**table)
        texts = [getattr(entry, item.name) for item in fields(Entry) if item.name != "number"]
        whole = all(isinstance(text, str) for text in texts) and DIGEST.fullmatch(entry.digest) and entry.hash == mark
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry if whole else None
