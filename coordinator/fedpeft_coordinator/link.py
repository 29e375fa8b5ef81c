"""The guarded SuperLink process: ``python -m fedpeft_coordinator.link CONFIG.json``.

One process, two listeners. The public one serves the fleet calls and ``/health``; the private one, on loopback, serves
everything to callers that hold the secret. Flower alone would serve all of it to anyone who reaches its port.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpeft.processes import hold
from fedpeft_coordinator.guard import Bell, fleet_only, secret_only


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

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> LinkSettings:
        """Inverse of `save`."""
        return LinkSettings(**json.loads(path.read_text(encoding="utf-8")))


async def serve(settings: LinkSettings) -> None:
    """Serve both listeners until either ends."""
    import uvicorn

    from fedpeft.wire import _compat

    secret = Path(settings.secret_file).read_bytes()
    app = _compat.link_app(secret, settings.node_auth, settings.private_port)
    bell = Bell()
    private = secret_only(app, bell, _compat.SECRET_HEADER, _compat.secret_header(secret))
    quiet: dict[str, Any] = {"log_level": "warning", "lifespan": "on", "timeout_graceful_shutdown": 1}
    tls: dict[str, Any] = {"ssl_certfile": settings.certificate, "ssl_keyfile": settings.key}
    servers = [
        uvicorn.Server(uvicorn.Config(private, host="127.0.0.1", port=settings.private_port, **quiet)),
        uvicorn.Server(uvicorn.Config(fleet_only(app, bell), host=settings.host, port=settings.port, **quiet, **tls)),
    ]
    running = [asyncio.create_task(server.serve()) for server in servers]
    while not any(server.should_exit for server in servers) and not any(task.done() for task in running):
        await asyncio.sleep(0.1)
    bell.close()
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*running)


def main() -> int:
    """Entry of the process: one argument, the path of a `LinkSettings` file."""
    from fedpeft.wire._compat import OFFLINE

    hold()
    os.environ.update(OFFLINE)
    settings = LinkSettings.read(Path(sys.argv[1]))
    asyncio.run(serve(settings))
    return 1


if __name__ == "__main__":
    sys.exit(main())
