"""What the listeners let through, driven as plain ASGI; and the wait for news."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest

from fedpeft_coordinator import guard
from fedpeft_coordinator.guard import MAX_BODY, QUESTION, Bell, fleet_only, secret_only

Event = MutableMapping[str, Any]


class SuperLink:
    """Answers every question from a list, and keeps what it was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.bodies = list(answers), []

    async def __call__(self, scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.answers.pop(0)})


async def call(app: Any, path: str, headers: dict[str, str] | None = None, gone: asyncio.Event | None = None) -> tuple[int, bytes]:
    sent: list[Event] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(key.encode(), value.encode()) for key, value in {"content-length": "4", **(headers or {})}.items()],
    }
    asked = False

    async def receive() -> Event:
        nonlocal asked
        if asked:
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": b"body", "more_body": False}

    async def send(event: Event) -> None:
        sent.append(event)

    await app(scope, receive, send)
    return (sent[0]["status"], b"".join(event.get("body", b"") for event in sent[1:])) if sent else (0, b"")


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet", "/v1/fleets/x", "/V1/fleet/x", "", "/health/x"]
)
def test_the_public_sees_the_fleet_only(path: str) -> None:
    assert asyncio.run(call(fleet_only(SuperLink(), Bell()), path)) == (404, b"")


def test_fleet_calls_pass() -> None:
    assert asyncio.run(call(fleet_only(SuperLink(b"yes"), Bell()), "/v1/fleet/push-object")) == (200, b"yes")


@pytest.mark.parametrize("length", [str(MAX_BODY + 1), "-1", "many", ""])
def test_bodies_are_bounded(length: str) -> None:
    assert asyncio.run(call(fleet_only(SuperLink(), Bell()), "/v1/fleet/push-object", {"content-length": length})) == (413, b"")


def test_the_private_listener_asks_for_the_secret() -> None:
    app = secret_only(SuperLink(b"yes", b"yes"), Bell(), "x-s", "right")
    assert asyncio.run(call(app, "/v1/control/start-run")) == (404, b"")
    assert asyncio.run(call(app, "/v1/control/start-run", {"x-s": "wrong"})) == (404, b"")
    assert asyncio.run(call(app, "/v1/control/start-run", {"x-s": "right"})) == (200, b"yes")
    assert asyncio.run(call(app, "/health")) == (200, b"yes")


def test_a_fruitless_question_waits_for_news() -> None:
    async def scene() -> None:
        bell, link = Bell(), SuperLink(b"", b"a message")
        asking = asyncio.ensure_future(call(fleet_only(link, bell), QUESTION))
        await asyncio.sleep(0.05)
        assert not asking.done()
        await call(secret_only(SuperLink(b"sent"), bell, "x-s", "s"), "/v1/runtime/push-messages", {"x-s": "s"})
        assert await asyncio.wait_for(asking, 5) == (200, b"a message")
        assert link.bodies == [b"body", b"body"]

    asyncio.run(scene())


def test_a_question_ends_without_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HOLD_SECONDS", 0.05)
    assert asyncio.run(call(fleet_only(SuperLink(b""), Bell()), QUESTION)) == (200, b"")


def test_nothing_is_taken_for_a_node_that_hung_up() -> None:
    async def scene() -> None:
        bell, link, gone = Bell(), SuperLink(b"", b"a message that would be lost"), asyncio.Event()
        asking = asyncio.ensure_future(call(fleet_only(link, bell), QUESTION, gone=gone))
        await asyncio.sleep(0.05)
        gone.set()
        assert await asyncio.wait_for(asking, 5) == (0, b"")
        bell.ring()
        await asyncio.sleep(0.1)
        assert len(link.bodies) == 1

    asyncio.run(scene())
