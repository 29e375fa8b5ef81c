"""Local-only, federated and central training of the same tasks, side by side (see README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedpeft.parity.drive import Request

__all__ = ["compare", "work"]


def compare(request: Request, console: Console) -> dict[str, Any]:
    """Run what is not done of ``request`` and return its figures. Raises `FedpeftError`: what stopped it; the same call goes on."""
    from fedpeft.parity.drive import drive

    return drive(request, console)


def work(folder: Path, arm: str, engine: str) -> None:
    """One arm of the run in ``folder``, in this process. Raises `FedpeftError`."""
    from fedpeft.parity.arms import work as run

    run(folder, arm, engine)
