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
HOLD_SECONDS = 10.0
"""Well under the 30 s after which a SuperNode gives a call up."""
QUESTION = "/v1/fleet/pull-messages"
NEWS = "/v1/runtime/push-messages"


@dataclass
class Bell:
    """Rung when the coordinator has sent messages."""

    _waiters: list[asyncio.Event] = field(default_factory=list)

    def ring(self) -> None:
        """Wake everybody who waits."""
        for waiter in self._waiters:
            waiter.set()
        self._waiters.clear()

    def listen(self) -> asyncio.Event:
        """An event that the next ring sets."""
        event = asyncio.Event()
        self._waiters.append(event)
        return event


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
        if scope.get("path") == NEWS:
            bell.ring()

    return guard


async def _hold(app: App, bell: Bell, call: tuple[Scope, Receive, Send]) -> None:
    """Ask ``app``; while it has nothing to say, wait for the bell and ask again, for `HOLD_SECONDS` in all."""
    scope, receive, send = call
    body = await _read(receive)
    end = asyncio.get_running_loop().time() + HOLD_SECONDS
    while True:
        rung = bell.listen()
        answer = await _ask(app, scope, body)
        left = end - asyncio.get_running_loop().time()
        if _says_something(answer) or left <= 0:
            break
        try:
            await asyncio.wait_for(rung.wait(), left)
        except TimeoutError:
            break
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
