"""From ``model`` to what answers: the base, a task's version, a given mixture, or where the text is routed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedpeft.errors import AdapterError, BaseError, FedpeftError
from fedpeft.serving import Mixture, Served
from fedpeft.serving.backend import Backend
from fedpeft_client.serve.errors import ApiError, invalid
from fedpeft_client.serve.schema import Ours

BASE, AUTO, TASK = "base", "auto", "task:"


@dataclass(frozen=True)
class Target:
    """What answers: ``shares`` of tasks (none is the base alone), how that was decided, and the only task, where it is one.

    ``own`` is what the site's private pair counts beside the only task's version; ``router`` is the one that weighs every token anew.
    """

    shares: Mapping[str, float]
    route: Mapping[str, Any]
    served: Served | None = None
    own: float = 0.0
    router: str = ""

    @property
    def kind(self) -> str:
        """``generation`` (the base too), ``classification`` or ``choice``."""
        return self.served.task.kind if self.served else "generation"


@dataclass(frozen=True)
class Held:
    """A target with the versions that serve it now; they stay until all requests that shared them have ended."""

    target: Target
    mixture: Mixture

    def said(self, **extra: Any) -> dict[str, Any]:
        """The response's ``fedpeft`` field."""
        return {"mixture": dict(self.mixture), "route": dict(self.target.route), **extra}

    @property
    def header(self) -> dict[str, str]:
        """The same, short, as a header; versions' names are ASCII."""
        return {"x-fedpeft-mixture": ", ".join(f"{name}={weight:g}" for name, weight in self.mixture.items()) or BASE}


async def choose(backend: Backend, model: str, ours: Ours | None, text: str) -> Target:
    """The target that ``model`` names, the site's private pair weighed by ``text``; to a mixture that is given nothing is added.

    Raises:
        ApiError: (404) there is no such model or task.
    """
    target = await _named(backend, model, ours, text)
    if target.served is None or ours is not None or not text:
        return target
    return replace(target, own=await backend.own(target.served, text))


async def _named(backend: Backend, model: str, ours: Ours | None, text: str) -> Target:
    if ours is not None:
        return _target(backend, ours.mixture, {"kind": "given"})
    if model == BASE:
        return Target({}, {"kind": BASE})
    if model == AUTO:
        return await _routed(backend, text)
    if model.startswith(TASK):
        return _target(backend, {model.removeprefix(TASK): 1.0}, {"kind": "task"})
    tasks = [TASK + name for name in sorted(backend.catalog.served())]
    raise ApiError(404, f"the model {model!r} does not exist; models are {[BASE, AUTO, *tasks]}", "model_not_found", "model")


@contextmanager
def hold(backend: Backend, target: Target) -> Iterator[Held]:
    """The versions that serve ``target`` now; requests made inside share them. Raises `ApiError` (404) when a task is gone."""
    try:
        held = Held(target, _mixed(backend, target, backend.catalog.take(target.shares)))
    except AdapterError as fault:
        raise ApiError(404, str(fault), "model_not_found", "model") from None
    try:
        yield held
    finally:
        backend.catalog.release(held.mixture)


def _mixed(backend: Backend, target: Target, mixture: Mixture) -> Mixture:
    if target.served:
        return backend.with_own(mixture, target.own)
    return backend.weighed(mixture, target.router) if target.router else mixture


async def _routed(backend: Backend, text: str) -> Target:
    try:
        asked = await asyncio.to_thread(backend.route, text)  # the first time after a swap it makes the router
    except (AdapterError, BaseError) as fault:
        raise ApiError(500, f"routing failed: {fault}", "routing_failed") from None
    route = await asyncio.wrap_future(asked)
    if isinstance(route, FedpeftError):
        raise ApiError(500, f"routing failed: {route}", "routing_failed")
    said = {"kind": route.router, "why": route.why, "task": route.task, "level": route.level, "score": route.score}
    target = _target(backend, backend.shares(route), {**said, "scores": dict(route.scores)})
    return replace(target, router=route.router) if route.level == "token" and len(target.shares) > 1 else target


def _target(backend: Backend, shares: Mapping[str, float], route: Mapping[str, Any]) -> Target:
    try:
        served = [backend.catalog.find(task) for task in shares]
    except AdapterError as fault:
        raise ApiError(404, str(fault), "model_not_found", "model") from None
    if len(served) == 1:
        return Target(shares, route, served[0])
    for one in served:
        if one.task.kind != "generation":
            raise invalid(
                f"task {one.task.name!r} is of kind {one.task.kind}, which is not mixed with others; mix generation tasks",
                "fedpeft.mixture",
            )
    return Target(shares, route)
