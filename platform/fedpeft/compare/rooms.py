"""The two halves of a rehearsal, which the rooms of sites and of the coordinator offer by entry points: the platform imports neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedpeft.errors import FedpeftError

if TYPE_CHECKING:
    from fedpeft.adapters import Adapter
    from fedpeft.wire import Envelope

    Handler = Callable[[Envelope], Envelope]
    Listener = Callable[[dict[str, Any]], None]

GROUP = "fedpeft.rehearsal"


class Sites(Protocol):
    """The sites' half."""

    def __call__(self, files: Iterable[Path], /) -> Mapping[str, Handler]:
        """Open the sites of one run: what answers messages, by name. Raises `ConfigError`."""
        ...


class Rounds(Protocol):
    """The coordinator's half."""

    def __call__(self, federation: Path, sites: Mapping[str, Handler], listen: Listener, /) -> Mapping[str, Adapter]:
        """Run all rounds of a federation.toml over ``sites``; the adapters by task. Raises `FedpeftError`."""
        ...


def sites() -> Sites:
    """Sites that share what is heavy for as long as they live. Raises `FedpeftError` when they are not installed."""
    opened: Sites = _offered("client")()
    return opened


def rounds() -> Rounds:
    """The coordinator's half. Raises `FedpeftError` when it is not installed."""
    found: Rounds = _offered("coordinator")
    return found


def _offered(room: str) -> Any:
    for entry in entry_points(group=GROUP, name=room):
        try:
            return entry.load()
        except ModuleNotFoundError:
            break
    raise FedpeftError(f"{room}: not installed; run pip install 'fedpeft[client,coordinator]'")
