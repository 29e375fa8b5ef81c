"""What registries say about a version, wherever they are, and the names of a task's histories."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedpeft.errors import AdapterError
from fedpeft.registry.log import Action
from fedpeft.registry.manifest import Manifest

TASK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,99}")


@dataclass(frozen=True)
class Version:
    """One event of a task's history and what it made current; ``digest`` names content, ``number`` counts the task's events."""

    task: str
    number: int
    digest: str
    manifest: Manifest
    path: Path | None
    action: Action
    origin: str
    created: str


class Source(Protocol):
    """What versions are pulled from: another registry, here or far away."""

    def get(self, ref: str) -> Version:
        """The version that ``ref`` names. Raises `AdapterError`."""
        ...

    def files(self, digest: str) -> dict[str, bytes]:
        """All its files, verified. Raises `StorageError`."""
        ...


def log_name(task: str) -> str:
    """Name of the history of a task. Raises `AdapterError` when the task cannot have one."""
    if not TASK.fullmatch(task):
        raise AdapterError(f"task {task!r} cannot be stored; a name has 1 to 100 letters, digits, spaces or any of _ . + -")
    return f"refs/{task}/log"


def moves_name(task: str) -> str:
    """Name of the history of the task's aliases. Raises `AdapterError` when it cannot have one."""
    return log_name(task).removesuffix("log") + "aliases"
