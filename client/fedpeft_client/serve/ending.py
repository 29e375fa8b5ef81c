"""The end of a server: nobody new is let in, who is inside may finish for a while, then the backend is closed and nothing is left."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn


@dataclass
class Door:
    """Who is inside, and since when nobody else is let in; one event loop, and signals between its steps."""

    inside: int = 0
    until: float | None = None
    """Monotonic seconds up to which those inside may stay; None while the door is open."""

    @property
    def closed(self) -> bool:
        """Whether nobody new is let in."""
        return self.until is not None

    @property
    def over(self) -> bool:
        """Whether the server may end: the door is closed, and all have left or stayed their time."""
        return self.until is not None and (self.inside == 0 or time.monotonic() >= self.until)

    def close(self, patience: float) -> None:
        """Let nobody in; those inside may stay for ``patience`` seconds from now."""
        self.until = time.monotonic() + patience


class Server(uvicorn.Server):
    """Uvicorn that listens on behind a closed `Door`, so that callers are told, until those inside have left.

    The first SIGINT or SIGTERM closes the door, a second one cuts off who is still inside, a third is the system's own. ``close`` is
    called once, before connections are closed: what it ends can still be answered.
    """

    def __init__(self, config: uvicorn.Config, door: Door, patience: float, close: Callable[[], None]) -> None:
        super().__init__(config)
        self._door, self._patience, self._close = door, patience, close
        self.asked = 0
        """The number of the first signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; none is handed on when the loop is over."""
        self.asked = self.asked or sig
        if not self._door.closed:
            return self._door.close(self._patience)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        return self._door.close(0.0)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        return await super().on_tick(counter) or self._door.over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the backend, then let its last words reach who was cut off."""
        await asyncio.to_thread(self._close)
        await super().shutdown(sockets)
