"""A server ends in order: callers are told, who is inside may finish, the backend is closed once, no thread is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from fedpeft_client.serve.ending import Door, Server
from fedpeft_client.serve.guard import Guard
from fedpeft_client.serve.metrics import Metrics
from fedpeft_client.serve.settings import Serve


class App:
    """Answers /quick at once, and /slow when told, or when the backend is closed."""

    def __init__(self) -> None:
        self.told, self.closed, self.asked = threading.Event(), [], threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] == "/slow":
            self.asked.set()
            await asyncio.to_thread(self.told.wait)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"cut" if self.closed else b"all"})

    def close(self) -> None:
        self.closed.append(time.monotonic())
        self.told.set()


@pytest.fixture
def run():
    """Serve in this thread, the only one that signals reach, while ``caller`` works in another; its result, and the app."""

    def go(caller, patience: float, first: int = signal.SIGTERM):
        app, door, found, before = App(), Door(), [], set(threading.enumerate())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            guard = Guard(app, Serve(), Metrics(), ["/slow", "/quick"], door)
            config = uvicorn.Config(guard, log_config=None, lifespan="off", http="h11", ws="none", timeout_graceful_shutdown=1)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            server = Server(config, door, patience, app.close)

            def call() -> None:
                try:
                    found.append(caller(app, url))
                except BaseException:
                    server.should_exit = True
                    raise

            thread = threading.Thread(target=call)
            thread.start()
            server.run(sockets=[listener])
            thread.join()
        assert set(threading.enumerate()) == before
        assert len(app.closed) == 1
        assert server.asked == first
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return found[0], app

    return go


def slow(app: App, url: str) -> tuple[threading.Thread, list[httpx.Response]]:
    """A caller that is inside."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(httpx.get(f"{url}/slow", timeout=30)))
    thread.start()
    assert app.asked.wait(10)
    return thread, answers


def stop(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_nobody_is_let_in_and_who_is_inside_gets_all(run, number):
    def caller(app: App, url: str) -> list[httpx.Response]:
        with httpx.Client() as kept:
            assert kept.get(f"{url}/quick").text == "all"
            thread, answers = slow(app, url)
            stop(number)
            refused = [kept.get(f"{url}/quick"), httpx.get(f"{url}/quick"), httpx.get(f"{url}/healthz")]
            app.told.set()
            thread.join()
        return [*answers, *refused]

    (inside, *refused), _ = run(caller, 30.0, number)
    assert (inside.status_code, inside.text) == (200, "all")
    for one in refused:
        assert (one.status_code, one.headers["retry-after"]) == (503, "5")
        assert "is stopping" in one.json()["error"]["message"]


@pytest.mark.parametrize("twice", [True, False], ids=["a second signal", "patience"])
def test_who_stays_too_long_is_cut_off_by(run, twice):
    def caller(app: App, url: str) -> httpx.Response:
        thread, answers = slow(app, url)
        stop(signal.SIGTERM)
        if twice:
            while httpx.get(f"{url}/quick").status_code != 503:
                pass  # two signals at once would be taken by their numbers
            stop(signal.SIGINT)
        thread.join()
        return answers[0]

    began = time.monotonic()
    answer, app = run(caller, patience=60.0 if twice else 0.2)
    assert answer.text == "cut"
    assert app.closed[0] - began < 20


def test_a_server_that_nobody_is_in_ends_at_once(run):
    def caller(app: App, url: str) -> None:
        assert httpx.get(f"{url}/quick").text == "all"
        stop(signal.SIGTERM)

    run(caller, patience=60.0)
