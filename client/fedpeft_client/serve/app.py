"""The ASGI application, and the task that watches for new versions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedpeft.errors import FedpeftError
from fedpeft.serving.backend import Backend
from fedpeft_client.serve.ending import Door
from fedpeft_client.serve.endpoints import Endpoints
from fedpeft_client.serve.errors import ApiError
from fedpeft_client.serve.guard import Guard
from fedpeft_client.serve.metrics import Metrics
from fedpeft_client.serve.settings import Serve

log = logging.getLogger("fedpeft.serving")


def build(backend: Backend, settings: Serve, door: Door) -> Starlette:
    """The application over a running backend, behind ``door``; it watches the registry while it runs and leaves the backend open."""
    metrics = Metrics()
    ends = Endpoints(backend, settings, metrics)
    routes = [
        Route("/v1/chat/completions", ends.chat, methods=["POST"]),
        Route("/v1/completions", ends.completions, methods=["POST"]),
        Route("/v1/embeddings", ends.embeddings, methods=["POST"]),
        Route("/v1/models", ends.models, methods=["GET"]),
        Route("/v1/models/{name:path}", ends.model, methods=["GET"]),
        Route("/healthz", ends.health, methods=["GET"]),
        Route("/metrics", ends.prometheus, methods=["GET"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch(backend, settings.watch_seconds, door))
        yield
        watching.cancel()

    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, settings=settings, metrics=metrics, paths=[route.path for route in routes], door=door)],
        exception_handlers={HTTPException: _http_fault, ApiError: _api_fault, ClientDisconnect: _left},
        lifespan=lifespan,
    )


async def _watch(backend: Backend, seconds: float, door: Door) -> None:
    """Bring new versions in and let old ones go, off the event loop; a fault is logged and tried again."""
    while not door.closed:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(backend.catalog.refresh)
            await asyncio.to_thread(backend.catalog.sweep)
        except (FedpeftError, OSError) as fault:
            log.warning("the registry cannot be read now: %s", fault)


async def _http_fault(request: Request, fault: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(fault, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(fault.status_code)
    error = ApiError(fault.status_code, f"{request.method} {request.url.path[:200]}: {fault.detail}", code)
    return JSONResponse(error.body(), fault.status_code, {**(fault.headers or {})})


async def _api_fault(_request: Request, fault: Exception) -> Response:
    assert isinstance(fault, ApiError)
    return JSONResponse(fault.body(), fault.status, fault.headers)


async def _left(_request: Request, _fault: Exception) -> Response:
    """Nobody reads this: the caller has left."""
    return Response(status_code=499)
