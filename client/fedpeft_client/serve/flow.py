"""Events of the engine's thread, read on the event loop: a few generations of one response as one stream of (choice, event)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from fedpeft.serving import ClosedError, End, Event, Failed, Mixture, OverloadedError, Piece, Request, Sampling
from fedpeft.serving.backend import Backend
from fedpeft_client.serve.errors import ApiError


@dataclass(frozen=True)
class Wanted:
    """One choice to generate."""

    prompt: tuple[int, ...]
    sampling: Sampling


class Flow:
    """The generations of one response, all by ``mixture``, which is held. `close` must be called: it frees what still runs.

    Whoever reads slowly holds up nobody: generation goes on, and unread pieces of a choice become one, unless each token's
    log-probability is wanted; so that what waits is the choice's text.
    """

    def __init__(self, backend: Backend, wanted: Sequence[Wanted], mixture: Mixture) -> None:
        self._unread: dict[int, list[Event]] = {}
        self._came = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._requests: list[Request] = []
        self._left = len(wanted)
        try:
            for number, one in enumerate(wanted):
                request = Request(one.prompt, backend.catalog.share(mixture), one.sampling, self._sink(number), self)
                backend.submit(request)
                self._requests.append(request)
        except BaseException:
            self.close()
            raise

    def _sink(self, number: int) -> Callable[[Event], None]:
        def sink(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._take, number, event)

        return sink

    def _take(self, number: int, event: Event) -> None:
        events = self._unread.setdefault(number, [])
        last = events[-1] if events else None
        if isinstance(last, Piece) and isinstance(event, Piece) and event.token.logprob is None:
            events[-1] = Piece(event.token, last.text + event.text)
        else:
            events.append(event)
        self._came.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Every event until all choices have ended. Raises `ApiError` (500) when the engine failed."""
        while self._left:
            await self._came.wait()
            self._came.clear()
            unread, self._unread = self._unread, {}
            for number, event in [(number, event) for number, events in unread.items() for event in events]:
                if isinstance(event, Failed):
                    raise ApiError(500, f"{event.message}; ask again", "server_error")
                self._left -= isinstance(event, End)
                yield number, event

    def close(self) -> None:
        """The caller has all, or left."""
        for request in self._requests:
            request.cancel()


def refusal(fault: OverloadedError | ClosedError) -> ApiError:
    """429 where asking again helps, 503 where another server must be asked; both say when."""
    if isinstance(fault, OverloadedError):
        return ApiError(429, str(fault), "overloaded", retry_after=fault.retry_after)
    return ApiError(503, str(fault), "unavailable", retry_after=5)
