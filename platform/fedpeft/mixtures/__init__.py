"""Many adapters in one forward: which adapter acts on which row or token, with which weight (see README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.mixtures.gates import Gates

if TYPE_CHECKING:
    from fedpeft.mixtures.bank import Bank

__all__ = ["Bank", "Gates"]


def __getattr__(name: str) -> Any:
    """Import `Bank`, and torch with it, when it is first asked for."""
    if name != "Bank":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedpeft.mixtures.bank import Bank

    return Bank
