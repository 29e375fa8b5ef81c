"""The registry that a federation or a control plane works on, as its settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpeft.registry import Registry
    from fedpeft_coordinator.control.config import Control


def open_registry(folder: Path, control: Control | None = None) -> Registry:
    """The registry in ``folder``, with versions and histories where ``control`` wants them; keys stay in the folder.

    Raises:
        StorageError: the store or the database cannot be opened.
    """
    from fedpeft.registry import Registry, open_store

    if control is None or (control.store is None and control.database is None):
        return Registry(folder)
    from fedpeft_coordinator.control.database import SqlHistories

    database = control.database or f"sqlite:///{(folder / 'registry.sqlite').resolve()}"
    return Registry(folder, open_store(control.store or folder), SqlHistories(database))


@contextmanager
def opened(folder: Path, control: Control) -> Iterator[Registry]:
    """`open_registry`, whose connections are closed afterwards: by then nobody may look at it any more."""
    from fedpeft_coordinator.control.database import SqlHistories

    registry = open_registry(folder, control)
    try:
        yield registry
    finally:
        if isinstance(registry.histories, SqlHistories):
            registry.histories.close()
