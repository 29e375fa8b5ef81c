"""What stands before every endpoint: who may call, from where, how much, how slowly; pure ASGI, so that streams pass unbuffered."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedpeft.serving import ClosedError, OverloadedError
from fedpeft_client.serve.ending import Door
from fedpeft_client.serve.errors import ApiError
from fedpeft_client.serve.flow import refusal
from fedpeft_client.serve.metrics import Metrics
from fedpeft_client.serve.settings import Serve

log = logging.getLogger("fedpeft.serving")
OPEN = ("/healthz",)
"""What needs no key: it tells nothing but that the server lives."""


class Guard:
    """Checks door, host and key, turns faults into OpenAI's errors, bounds how long one write may hang, and counts."""

    def __init__(self, app: ASGIApp, settings: Serve, metrics: Metrics, paths: Sequence[str], door: Door) -> None:
        self._app, self._metrics, self._door = app, metrics, door
        self._keys = settings.key_digests()
        self._hosts = {host.lower() for host in settings.allowed_hosts}
        self._most = settings.connections
        self._stall, self._paths = settings.stall_seconds, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status, path = time.monotonic(), 500, scope["path"] if scope["path"] in self._paths else "other"
        started = False

        async def watched(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            async with asyncio.timeout(self._stall):
                await send(message)

        self._door.inside += 1
        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._app(scope, receive, watched)
        except TimeoutError:
            status = 499
            log.warning("a caller of %s read nothing for %g s and was let go", path, self._stall)
            raise
        except Exception as fault:
            if started:
                raise
            await _answer(fault, path)(scope, receive, watched)
        finally:
            self._door.inside -= 1
            self._metrics.answered(path, status, time.monotonic() - began)

    def _check(self, headers: Headers, path: str) -> None:
        if self._door.closed:
            raise ClosedError("the server is stopping; ask another one")
        if self._door.inside > self._most:
            raise ApiError(503, f"{self._most} requests are open, which is all that is allowed; ask again", "overloaded", retry_after=1)
        host = headers.get("host", "").lower()
        if self._hosts and _hostname(host) not in self._hosts:
            raise ApiError(421, f"this server is not called {host[:80]!r}; set serve.hosts to the names that it may be called by")
        if self._keys and path not in OPEN and not self._known(headers.get("authorization", "")):
            raise ApiError(401, "no valid API key; send 'Authorization: Bearer KEY' with a key of this server", "invalid_api_key")

    def _known(self, authorization: str) -> bool:
        """Whether the key is one of ours; all are compared, in constant time, so that the time says nothing."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        same = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(same)


def _answer(fault: Exception, path: str) -> JSONResponse:
    if isinstance(fault, OverloadedError | ClosedError):
        fault = refusal(fault)
    if not isinstance(fault, ApiError):
        log.exception("a request of %s failed", path, exc_info=fault)
        fault = ApiError(500, "the server failed on this request; see its log", "server_error")
    return JSONResponse(fault.body(), fault.status, fault.headers)


def _hostname(host: str) -> str:
    """The name in a Host header, without its port and an IPv6 address's brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
