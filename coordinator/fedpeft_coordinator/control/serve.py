"""The server: services, health and reflection behind the gate, on one event loop with two thread pools.

The loop does nothing that blocks. `READERS` threads do short work on files (a chunk, a listing); `WORKERS` do long work (hashing and
judging a push, reading a text), so that pushes and texts wait for each other and pulls for neither.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedpeft.certificates import lapsing
from fedpeft.control.channel import LIMITS
from fedpeft.control.staging import Staging
from fedpeft.errors import ConfigError, LinkError
from fedpeft.registry import Registry
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.control.federation import FederationService
from fedpeft_coordinator.control.feed import Feed
from fedpeft_coordinator.control.gate import Gate, Record
from fedpeft_coordinator.control.registry import RegistryService
from fedpeft_coordinator.control.router import Reader, RouterService, Texts
from fedpeft_coordinator.control.tokens import Tokens
from fedpeft_coordinator.listening import Tls
from fedpeft_coordinator.status import Watched

LOG = logging.getLogger("fedpeft.control")
READERS, WORKERS = 8, 2
STREAMS = 2048
"""Calls at once on one connection."""
TEXTS = "fedpeft.v1.Router.Texts"
"""What health calls the reading of texts: it serves once base and encoder are loaded."""
GRACE = 2.0
"""Seconds that calls under way have when the server is ended; streams go on elsewhere where they stopped."""
OPTIONS: list[tuple[str, Any]] = [
    *LIMITS,
    ("grpc.max_concurrent_streams", STREAMS),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]


@dataclass
class Server:
    """A control plane over ``registry``; ``state`` holds broken pushes. Used on the event loop that runs it."""

    registry: Registry
    control: Control
    state: Path
    federation: Watched | None = None
    texts: Reader | None = None
    record: Record = lambda *_a, **_k: None

    async def start(self) -> int:
        """Listen; returns the port. Raises `LinkError` when it is taken, `ConfigError` when the certificate is none."""
        self._pools = ThreadPoolExecutor(READERS, "read"), ThreadPoolExecutor(WORKERS, "work")
        run, work = (partial(_on, pool) for pool in self._pools)
        self.feed = Feed(self.registry, run, self.control.poll)
        texts = self.texts or (Texts(self.registry) if self.control.embed else None)
        tokens = None if self.control.tokens is None else Tokens(self.control.tokens)
        if tokens is not None:
            tokens.check()
        scopes = {who: frozenset(tasks) for who, tasks in self.control.scopes.items()}
        anonymous = "" if self.control.tls else self.control.role
        self.gate = Gate(anonymous, self.record, frozenset(self.control.revoked), tokens, scopes)
        self._server = grpc.aio.server(interceptors=[self.gate], options=OPTIONS)
        router = RouterService(self.feed, texts, run, work)
        services = {
            "Registry": RegistryService(self.feed, self.control, Staging(self.state / "staging", self.control.staging), run, work),
            "Router": router,
            "Federation": FederationService(self.federation, run, self.control.poll),
        }
        self._health = _add(self._server, services)
        port = self._listen()
        await self._server.start()
        for name in ("", *(f"fedpeft.v1.{name}" for name in services)):
            await self._tell(name, True)
        self._tasks = [asyncio.create_task(self.feed.follow())]
        if isinstance(texts, Texts):
            await self._tell(TEXTS, False)
            self._tasks.append(asyncio.create_task(router.warm(texts, partial(self._tell, TEXTS))))
        return port

    async def stop(self) -> None:
        """Refuse new calls, end those under way after `GRACE`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE)
        for task in self._tasks:
            task.cancel()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    async def run(self, told: Callable[[int], None]) -> int:
        """Serve until SIGTERM or SIGINT, whose number is returned; ``told`` hears the port."""
        asked: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, asked.put_nowait, int(number))
        told(await self.start())
        try:
            return await asked.get()
        finally:
            await self.stop()

    async def _tell(self, name: str, serving: bool) -> None:
        from grpc_health.v1.health_pb2 import HealthCheckResponse

        await self._health.set(name, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    def _listen(self) -> int:
        host, tls = self.control.host, self.control.tls
        where = f"[{host}]:{self.control.port}" if ":" in host else f"{host}:{self.control.port}"
        try:
            if tls is None:
                return int(self._server.add_insecure_port(where))
            return int(self._server.add_secure_port(where, credentials(tls, self.control.tokens is None)))
        except RuntimeError:
            raise LinkError(f"control {where}: cannot listen there; stop what does, or set control.port") from None


def credentials(tls: Tls, mutual: bool = True) -> grpc.ServerCredentials:
    """The server's certificate, and, where it is ``mutual``, the CA that callers' certificates must be signed by.

    Raises:
        ConfigError: a file is missing or is no certificate.
        PolicyError: the certificate is not valid now.
    """
    lapsing(tls.cert)
    try:
        key, cert, ca = (path.read_bytes() for path in (tls.key, tls.cert, tls.ca))
    except OSError as fault:
        raise ConfigError(f"{fault.filename}: cannot be read: {fault.strerror}; `fedpeft certificates` makes certificates") from None
    return grpc.ssl_server_credentials([(key, cert)], ca if mutual else None, require_client_auth=mutual)


def _add(server: Any, services: dict[str, Any]) -> Any:
    """Add the services, health and reflection; returns health."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_health.v1.health import aio as health
    from grpc_reflection.v1alpha import reflection

    from fedpeft.v1 import federation_pb2_grpc, registry_pb2_grpc, router_pb2_grpc

    adders = {"Registry": registry_pb2_grpc, "Router": router_pb2_grpc, "Federation": federation_pb2_grpc}
    for name, service in services.items():
        getattr(adders[name], f"add_{name}Servicer_to_server")(service, server)
    watched = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(watched, server)
    names = [f"fedpeft.v1.{name}" for name in services]
    reflection.enable_server_reflection(
        (*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    return watched


async def _on(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call on a thread of ``pool``, with this call's context."""
    from contextvars import copy_context

    return await asyncio.get_running_loop().run_in_executor(pool, partial(copy_context().run, function, *arguments))
