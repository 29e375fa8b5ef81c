"""An adapter of the server's own beside a task's version, with a weight that each text decides (FedDPA's private pair)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from fedpeft.adapters import Adapter

if TYPE_CHECKING:
    from fedpeft.serving.catalog import Served

OWN = "+own"
"""What a bank calls it: the version's name with this behind."""

Embed = Callable[[str], Awaitable[Any]]
"""The bare base's embedding (D,) of a text, of length 1."""


class Beside(Protocol):
    """Who has adapters of its own."""

    def adapter(self, published: Adapter) -> Adapter | None:
        """The one that goes beside a published adapter; None where there is none for its task."""
        ...

    async def weight(self, served: Served, text: str, embed: Embed) -> float:
        """How much it counts for ``text``."""
        ...
