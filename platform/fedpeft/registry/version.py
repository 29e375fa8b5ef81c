"""What registries say about a version, wherever they are, and the names of a task's histories."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedpeft.errors import AdapterError
from fedpeft.registry.log import Action
from fedpeft.registry.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedpeft.adapters import Adapter
    from fedpeft.routing import RouterCard

Head = tuple[int, str]
"""The number of a task's last event, and the digest of the version that it made current."""
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

    def begins(self, prefix: str) -> bool:
        """Whether its digest, or its adapter's, begins so."""
        return self.digest.startswith(prefix) or self.manifest.adapter.startswith(prefix)


class Source(Protocol):
    """What versions are pulled from: another registry, here or far away."""

    def get(self, ref: str) -> Version:
        """The version that ``ref`` names. Raises `AdapterError`."""
        ...

    def files(self, digest: str) -> dict[str, bytes]:
        """All its files, verified. Raises `StorageError`."""
        ...


class Library(Source, Protocol):
    """A registry's verbs that are the same here and far away; all raise `AdapterError`, `StorageError`, and `LinkError` where it is far."""

    def heads(self) -> Mapping[str, Head]:
        """What each task serves now; cheap to ask again and again."""
        ...

    def tasks(self) -> tuple[str, ...]:
        """Tasks with a version."""
        ...

    def list(self, task: str | None = None) -> tuple[Version, ...]:
        """Every version of ``task``, or of all tasks, oldest first."""
        ...

    def history(self, task: str) -> tuple[dict[str, Any], ...]:
        """The events of ``task``, oldest first."""
        ...

    def load(self, ref: str) -> Adapter:
        """The adapter that ``ref`` names."""
        ...

    def served(self) -> Mapping[str, tuple[Version, RouterCard]]:
        """Task -> its current version and that one's router card."""
        ...

    def rollback(self, task: str, ref: str) -> Version:
        """Serve an earlier version again."""
        ...

    def alias(self, task: str, name: str, ref: str) -> Any:
        """Point an alias at a version; the move has a ``digest`` and a ``number``."""
        ...

    def aliases(self, task: str) -> dict[str, str]:
        """Digest by alias."""
        ...


def log_name(task: str) -> str:
    """Name of the history of a task. Raises `AdapterError` when the task cannot have one."""
    if not TASK.fullmatch(task):
        raise AdapterError(f"task {task!r} cannot be stored; a name has 1 to 100 letters, digits, spaces or any of _ . + -")
    return f"refs/{task}/log"


def moves_name(task: str) -> str:
    """Name of the history of the task's aliases. Raises `AdapterError` when it cannot have one."""
    return log_name(task).removesuffix("log") + "aliases"
