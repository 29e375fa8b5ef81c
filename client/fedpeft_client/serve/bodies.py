"""Reading a request's body within bounds, and noticing when its caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from fedpeft_client.serve.errors import ApiError
from fedpeft_client.serve.settings import Serve

T = TypeVar("T")


async def read(http: Request, settings: Serve) -> bytes:
    """The whole body.

    Raises:
        ApiError: it is no JSON by its type (415; a page in a browser can send all else without asking), too large (413) or too slow (408).
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80] or 'missing'!r}; send 'Content-Type: application/json'")
    limit = settings.max_body_kb * 1024
    try:
        return await asyncio.wait_for(_body(http, limit), settings.stall_seconds)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {settings.stall_seconds:g} s; send it again") from None


async def _body(http: Request, limit: int) -> bytes:
    said = http.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise _large(limit)
    found = bytearray()
    async for chunk in http.stream():
        found += chunk
        if len(found) > limit:
            raise _large(limit)
    return bytes(found)


async def until_gone(http: Request, work: Awaitable[T]) -> T:
    """What ``work`` gives, unless the caller leaves first: then it is cancelled and `ClientDisconnect` raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit:,} bytes; send less, or raise serve.max_body_kb", "body_too_large")
