"""The one thread that owns the model: generation step by step, and between two steps all else that needs the model.

Callers hand over and return at once; answers come by a request's sink, or by a future. Nothing here waits for a caller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import FedpeftError
from fedpeft.serving.requests import ClosedError, OverloadedError, Request
from fedpeft.serving.scheduler import Scheduler

Work = Callable[[list[Any]], list[Any]]
log = logging.getLogger("fedpeft.serving")
BROKEN_AFTER = 5
"""Steps in a row that may fail before the engine counts as broken."""


@dataclass(frozen=True, eq=False)
class _Ask:
    work: Work
    item: Any
    answer: Future[Any]


class Engine:
    """Runs a `Scheduler` and batched one-shot work on its own thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._inbox: list[Request] = []
        self._asks: list[_Ask] = []
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._failures = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fedpeft-engine", daemon=True)

    def start(self) -> Engine:
        """Begin."""
        self._thread.start()
        return self

    @property
    def healthy(self) -> bool:
        """Whether it runs, accepts work, and its last steps did not all fail."""
        return self._thread.is_alive() and self._closing is None and self._failures < BROKEN_AFTER

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait (one-shot work included)."""
        return len(self.scheduler.running), len(self.scheduler.waiting) + len(self._inbox) + len(self._asks)

    def submit(self, request: Request) -> None:
        """Queue a generation. Raises `OverloadedError` when the queue is full, `ClosedError` when the engine stops."""
        with self._changed:
            self._require_open()
            self.scheduler.require_room(len(self._inbox))
            self._inbox.append(request)
            self._changed.notify()

    def ask(self, work: Work, item: Any) -> Future[Any]:
        """Have ``work`` answer ``item``; items of one ``work`` that wait together are answered in one call of it.

        Raises:
            OverloadedError, ClosedError: as `submit`.
        """
        with self._changed:
            self._require_open()
            if len(self._asks) >= self.scheduler.limits.queue:
                raise OverloadedError(f"{len(self._asks)} texts wait, which is all that is allowed; ask again later")
            ask = _Ask(work, item, Future())
            self._asks.append(ask)
            self._changed.notify()
            return ask.answer

    def call(self, change: Callable[[], Any]) -> Any:
        """Run ``change`` on the engine's thread between two steps and wait for what it gives or raises.

        It passes the queue's bound by, and still runs while the engine drains. On the engine's own thread it runs at once.
        """
        if threading.current_thread() is self._thread:
            return change()
        ask = _Ask(lambda _items: [change()], None, Future())
        with self._changed:
            if self._stopped:
                raise ClosedError("the engine has stopped")
            self._asks.insert(0, ask)
            self._changed.notify()
        return ask.answer.result()

    def close(self, patience: float = 0.0) -> None:
        """Accept nothing more, let running requests go on for ``patience`` seconds, then end them."""
        with self._changed:
            self._closing = time.monotonic() + patience
            self._changed.notify()
        self._thread.join()

    def _require_open(self) -> None:
        if self._closing is not None or self._stopped:
            raise ClosedError("the server is stopping; ask another one")
        if self._failures >= BROKEN_AFTER:
            raise ClosedError(f"the last {self._failures} steps failed; see the server's log")

    def _run(self) -> None:
        while self._wait():
            self._answer()
            before = self.scheduler.counts.row_steps
            try:
                self.scheduler.step()
                self._failures = self._failures if self.scheduler.counts.row_steps == before else 0
            except Exception as fault:
                self._failures += 1
                log.exception("a step failed; its requests are ended")
                self.scheduler.fail(f"the model failed: {type(fault).__name__}")
        self.scheduler.abort("the server was stopped")
        self._refuse_asks()

    def _wait(self) -> bool:
        """Sleep until there is work; False when it is time to stop."""
        with self._changed:
            while not self._inbox and not self._asks and self.scheduler.idle and self._closing is None:
                self._changed.wait()
            self.scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
            busy = bool(self._asks) or not self.scheduler.idle
            return self._closing is None or (busy and time.monotonic() < self._closing)

    def _answer(self) -> None:
        """One batch of one-shot work, so that generation goes on between two."""
        with self._changed:
            if not self._asks:
                return
            work, rows = self._asks[0].work, self.scheduler.limits.rows
            chosen = [ask for ask in self._asks if ask.work == work][:rows]
            self._asks = [ask for ask in self._asks if ask not in chosen]
        taken = [ask for ask in chosen if ask.answer.set_running_or_notify_cancel()]
        if taken:
            _settle(taken)

    def _refuse_asks(self) -> None:
        with self._changed:
            self._stopped = True
            for ask in self._asks:
                if ask.answer.set_running_or_notify_cancel():
                    ask.answer.set_exception(ClosedError("the server was stopped"))
            self._asks.clear()


def _settle(asks: list[_Ask]) -> None:
    try:
        answers = asks[0].work([ask.item for ask in asks])
    except Exception as fault:
        if not isinstance(fault, FedpeftError):
            log.exception("one-shot work failed")
        for ask in asks:
            ask.answer.set_exception(fault)
        return
    for ask, answer in zip(asks, answers, strict=True):
        ask.answer.set_result(answer)
