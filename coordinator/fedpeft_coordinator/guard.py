"""What the SuperLink's two listeners let through, and the wait that saves Flower's polling.

A SuperNode asks for work every 3 s, so that an exchange costs seconds even when nobody computes. The public guard
therefore keeps a fruitless question open until the coordinator has sent something (or `HOLD_SECONDS` are over) and then
asks the SuperLink again on the node's behalf: the node has its message at once.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 64 << 20
"""Bytes of one public request; Flower cuts arrays into pieces of 5 MiB."""
HOLD_SECONDS = 20.0
"""Well under the 30 s after which a SuperNode gives a call up."""
QUESTION = "/v1/fleet/pull-messages"
NEWS = frozenset({"/v1/runtime/push-messages", "/v1/runtime/push-object"})
SETTLE_SECONDS = 0.05
"""A message's arrays follow in calls of their own; a node that is told too early would wait a second for them."""


@dataclass
class Bell:
    """Rung when the coordinator has sent messages and their arrays."""

    _waiters: list[asyncio.Event] = field(default_factory=list)
    _soon: asyncio.TimerHandle | None = None
    _closed: bool = False

    def ring(self) -> None:
        """Wake everybody who waits, once nothing more was sent for `SETTLE_SECONDS`."""
        if self._soon is not None:
            self._soon.cancel()
        self._soon = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._wake)

    def _wake(self) -> None:
        for waiter in self._waiters:
            waiter.set()
        self._waiters.clear()

    def close(self) -> None:
        """Nobody waits any longer: the process ends."""
        self._closed = True
        self._wake()

    async def heard(self, seconds: float, gone: asyncio.Future[Any]) -> bool:
        """Wait for a ring; False after ``seconds``, when the caller is ``gone`` or the process ends."""
        rung = asyncio.Event()
        self._waiters.append(rung)
        waiting: asyncio.Future[Any] = asyncio.ensure_future(rung.wait())
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if rung in self._waiters:
            self._waiters.remove(rung)
        return rung.is_set() and not gone.done() and not self._closed


def fleet_only(app: App, bell: Bell) -> App:
    """``app`` as the public may see it: fleet calls of bounded size and ``/health``; anything else is 404."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _own_lifespan(receive, send)
        elif scope["type"] != "http" or not (scope["path"].startswith("/v1/fleet/") or scope["path"] == "/health"):
            await _refuse(send, 404)
        elif scope["method"] == "POST" and not _length(scope) <= MAX_BODY:
            await _refuse(send, 413)
        elif scope["path"] == QUESTION:
            await _hold(app, bell, (scope, receive, send))
        else:
            await app(scope, receive, send)

    return guard


def secret_only(app: App, bell: Bell, name: str, value: str) -> App:
    """``app`` for callers whose header ``name`` is ``value``; other local users get 404 for all but ``/health``."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(name.encode(), b"")
            if not hmac.compare_digest(given, value.encode()):
                await _refuse(send, 404)
                return
        await app(scope, receive, send)
        if scope.get("path") in NEWS:
            bell.ring()

    return guard


async def _hold(app: App, bell: Bell, call: tuple[Scope, Receive, Send]) -> None:
    """Ask ``app``; while it has nothing to say, wait for the bell and ask again, for `HOLD_SECONDS` in all.

    It is not asked on behalf of a node that hung up: its message would be lost.
    """
    scope, receive, send = call
    body = await _read(receive)
    gone: asyncio.Future[Event] = asyncio.ensure_future(receive())
    end = asyncio.get_running_loop().time() + HOLD_SECONDS
    answer = await _ask(app, scope, body)
    while not _says_something(answer) and await bell.heard(end - asyncio.get_running_loop().time(), gone):
        answer = await _ask(app, scope, body)
    if not gone.done():
        gone.cancel()
        for event in answer:
            await send(event)


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        event = await receive()
        parts.append(event.get("body", b""))
        if event["type"] == "http.disconnect" or not event.get("more_body", False):
            return b"".join(parts)


async def _ask(app: App, scope: Scope, body: bytes) -> list[Event]:
    """What ``app`` answers to ``body``."""
    answer: list[Event] = []
    given = False
    over = asyncio.Event()

    async def receive() -> Event:
        nonlocal given
        if given:
            await over.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def keep(event: Event) -> None:
        answer.append(event)

    await app({**scope, "state": dict(scope.get("state", {}))}, receive, keep)
    over.set()
    return answer


def _says_something(answer: list[Event]) -> bool:
    """Whether an answer is more than "no message for you": an empty protobuf message."""
    return answer[0]["status"] != 200 or any(event.get("body") for event in answer[1:])


def _length(scope: Scope) -> float:
    given = dict(scope["headers"]).get(b"content-length", b"")
    return int(given) if given.isdigit() else float("inf")


async def _own_lifespan(receive: Receive, send: Send) -> None:
    """Answer the server's start and stop; the application's own lifespan belongs to the private listener."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
