"""What is in the registry's histories, read once for everybody who watches, and news of what anybody published."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fedpeft.control.changes import Snapshot, snapshot
from fedpeft.errors import FedpeftError
from fedpeft.registry import Registry

LOG = logging.getLogger("fedpeft.control")
Run = Callable[..., Awaitable[Any]]


@dataclass
class Feed:
    """Looks every ``poll`` seconds whether the histories grew; ``run`` calls a function on another thread.

    Watchers hold a place in the snapshot and no queue, so that a slow one costs nothing and misses nothing.
    """

    registry: Registry
    run: Run
    poll: float
    snapshot: Snapshot = field(default_factory=dict)
    generation: int = 0
    _stamp: object = None
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def follow(self) -> None:
        """Look for ever."""
        while True:
            try:
                await self.look()
            except FedpeftError as fault:
                LOG.error("registry: %s", fault)
            await asyncio.sleep(self.poll)

    async def look(self) -> Snapshot:
        """Look now; tell the watchers when something is new. Raises `StorageError` when a history is broken."""
        async with self._looking:
            stamp = await self.run(self.registry.histories.stamp)
            if stamp != self._stamp:
                self.snapshot = await self.run(snapshot, self.registry)
                self._stamp = stamp
                async with self._news:
                    self.generation += 1
                    self._news.notify_all()
        return self.snapshot

    async def newer(self, generation: int) -> int:
        """Wait until there is more than at ``generation``; returns the present one."""
        async with self._news:
            await self._news.wait_for(lambda: self.generation > generation)
            return self.generation
