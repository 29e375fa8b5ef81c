"""One federation under several settings and seeds, rehearsed on this machine, as one table (see README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedpeft.compare.drive import Request

__all__ = ["compare"]


def compare(request: Request, console: Console) -> dict[str, Any]:
    """Run what is not done of ``request`` and return its figures. Raises `FedpeftError`: what stopped it; the same call goes on."""
    from fedpeft.compare.drive import drive

    return drive(request, console)
