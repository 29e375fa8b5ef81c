"""The guarded SuperLink process: ``python -m fedpeft_coordinator.link CONFIG.json``.

One process, two listeners. The public one serves the fleet calls and ``/health``; the private one, on loopback, serves
everything to callers that hold the secret. Flower alone would serve all of it to anyone who reaches its port.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 64 << 20
"""Bytes of one public request; Flower cuts arrays into pieces of 5 MiB."""


@dataclass(frozen=True)
class LinkSettings:
    """What the process needs; paths are absolute. TLS guards the public listener only."""

    host: str
    port: int
    private_port: int
    secret_file: str
    certificate: str | None = None
    key: str | None = None
    node_auth: bool = False
    parent: int = 0

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> LinkSettings:
        """Inverse of `save`."""
        return LinkSettings(**json.loads(path.read_text(encoding="utf-8")))


def fleet_only(app: App) -> App:
    """``app`` as the public may see it: fleet calls of bounded size and ``/health``; anything else is 404."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _own_lifespan(receive, send)
        elif scope["type"] != "http" or not (scope["path"].startswith("/v1/fleet/") or scope["path"] == "/health"):
            await _refuse(send, 404)
        elif scope["method"] == "POST" and not _length(scope) <= MAX_BODY:
            await _refuse(send, 413)
        else:
            await app(scope, receive, send)

    return guard


def secret_only(app: App, name: str, value: str) -> App:
    """``app`` for callers whose header ``name`` is ``value``; other local users get 404 for all but ``/health``."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(name.encode(), b"")
            if not hmac.compare_digest(given, value.encode()):
                await _refuse(send, 404)
                return
        await app(scope, receive, send)

    return guard


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


def die_with(parent: int) -> None:
    """End this process, at once, when ``parent`` is no longer its parent. Needed for kill -9: nobody else tells us."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


async def serve(settings: LinkSettings) -> None:
    """Serve both listeners until either ends."""
    import uvicorn

    from fedpeft.wire import _compat

    secret = Path(settings.secret_file).read_bytes()
    app = _compat.link_app(secret, settings.node_auth, settings.private_port)
    private = secret_only(app, _compat.SECRET_HEADER, _compat.secret_header(secret))
    quiet: dict[str, Any] = {"log_level": "warning", "lifespan": "on", "timeout_graceful_shutdown": 1}
    tls: dict[str, Any] = {"ssl_certfile": settings.certificate, "ssl_keyfile": settings.key}
    servers = [
        uvicorn.Server(uvicorn.Config(private, host="127.0.0.1", port=settings.private_port, **quiet)),
        uvicorn.Server(uvicorn.Config(fleet_only(app), host=settings.host, port=settings.port, **quiet, **tls)),
    ]
    running = [asyncio.create_task(server.serve()) for server in servers]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*running, return_exceptions=True)


def main() -> int:
    """Entry of the process: one argument, the path of a `LinkSettings` file."""
    from fedpeft.wire._compat import OFFLINE

    os.environ.update(OFFLINE)
    settings = LinkSettings.read(Path(sys.argv[1]))
    if settings.parent:
        die_with(settings.parent)
    asyncio.run(serve(settings))
    return 1


if __name__ == "__main__":
    sys.exit(main())
