"""A task's history: one JSON line per event, appended and fsynced, each line carrying the hash of the line before.

A line that lacks its newline is one that a dying process did not finish: it never happened, and the next append cuts it off.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedpeft.errors import StorageError
from fedpeft.files import sync_folder
from fedpeft.registry import disk
from fedpeft.registry.manifest import sha256

START = "0" * 64
DIGEST = re.compile(r"[0-9a-f]{64}")
Action = Literal["publish", "rollback", "pull"]


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


def read(path: Path) -> tuple[Entry, ...]:
    """The events of the log at ``path``, oldest first; none when it does not exist.

    Raises:
        StorageError: a finished line is malformed, or its hash or number breaks the chain; the line is named.
    """
    if not path.exists():
        return ()
    entries: list[Entry] = []
    for line in disk.read(path).split(b"\n")[:-1]:
        entry = _parse(line)
        before = entries[-1].hash if entries else START
        if entry is None or entry.previous != before or entry.number != len(entries) + 1:
            raise StorageError(f"{path}: line {len(entries) + 1} was changed or is out of order; restore the file from a backup")
        entries.append(entry)
    return tuple(entries)


def append(path: Path, entries: Sequence[Entry], action: Action, digest: str, origin: str) -> Entry:
    """Add an event after ``entries`` (what `read` gave), durably; the caller holds the writer lock.

    Raises:
        OSError: it could not be written; the log is as it was.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    entry = Entry(len(entries) + 1, action, digest, origin, created, entries[-1].hash if entries else START)
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    end = 0 if fresh else path.read_bytes().rfind(b"\n") + 1
    with open(path, "ab", buffering=0) as stream:
        os.ftruncate(stream.fileno(), end)
        try:
            _write(stream.fileno(), json.dumps(entry.to_json(), sort_keys=True).encode() + b"\n")
            os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), end)
            raise
    if fresh:
        for folder in path.parents[:3]:
            sync_folder(folder)
    return entry


def _write(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


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
