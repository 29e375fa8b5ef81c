"""A response of server-sent events that always lets go of its generation, however it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """``close`` is called when the stream has ended, the caller has left, or nobody ever read it."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None], headers: Mapping[str, str]) -> None:
        super().__init__(
            chunks, media_type="text/event-stream", headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
