"""The service ``fedpeft.v1.Router``: the mixture for a text, an embedding or a task, and all router cards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.control import files
from fedpeft.control.faults import UnknownError
from fedpeft.errors import AdapterError, FedpeftError
from fedpeft.registry import Registry, Version, router_card
from fedpeft.registry.manifest import SIGNATURE
from fedpeft.routing import FILE, Request, RouterCard, make_router
from fedpeft.routing import Route as Found
from fedpeft.routing.policies import by_embedding
from fedpeft.v1 import router_pb2 as pb
from fedpeft.v1.registry_pb2 import Version as Row
from fedpeft.v1.router_pb2_grpc import RouterServicer
from fedpeft_coordinator.control.feed import Feed, Run
from fedpeft_coordinator.control.gate import CALLER, AbsentError, Caller

if TYPE_CHECKING:
    from fedpeft.service import Service

LOG = logging.getLogger("fedpeft.control")
Reader = Callable[["Served", str], Request]
"""A text as routers see it."""


@dataclass
class Served:
    """The served version of every task and its router card, as of ``generation`` of the feed."""

    generation: int = -1
    versions: Mapping[str, Version] = field(default_factory=dict)
    cards: Mapping[str, RouterCard] = field(default_factory=dict)

    def seen_by(self, caller: Caller) -> Served:
        """What of it is within ``caller``'s scope."""
        versions = {task: version for task, version in self.versions.items() if caller.sees(task)}
        return Served(self.generation, versions, {task: self.cards[task] for task in versions})

    def renewed(self, registry: Registry, generation: int) -> Served:
        """As it is now; cards of versions that are served still are not read again. Raises `StorageError`, `AdapterError`."""
        versions = {task: registry.get(task) for task in registry.tasks()}
        old = {version.digest: self.cards[task] for task, version in self.versions.items()}
        cards = {task: old.get(found.digest) or router_card(registry, found.digest) for task, found in versions.items()}
        return Served(generation, versions, cards)


class Texts:
    """Reads texts with the base and the encoder of what is served."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._service: Service | None = None
        self._loading = Lock()

    def __call__(self, served: Served, text: str) -> Request:
        """``text`` as routers see it. Raises `BaseError` when the base cannot be loaded or is another one."""
        return self._opened(served).request(text)

    def ready(self, served: Served) -> None:
        """Load what texts are read with, where it is not. Raises `BaseError` as a call does, and without the encoder of the cards."""
        _ = self._opened(served).encoder

    def _opened(self, served: Served) -> Service:
        from fedpeft.service import Service, load_base_of

        with self._loading:
            versions, cards = dict(served.versions), dict(served.cards)
            if self._service is None:
                self._service = Service(load_base_of(versions), self.registry, versions, {}, cards)
            elif self._service.cards != cards:
                self._service = self._service.renewed(versions, cards)
            return self._service


class RouterService(RouterServicer):
    """Routes over what ``feed.registry`` serves; ``texts`` None: this server has no base."""

    def __init__(self, feed: Feed, texts: Reader | None, run: Run, work: Run) -> None:
        self.feed, self.texts, self.run, self.work = feed, texts, run, work
        self._served = Served()
        self._renewing = asyncio.Lock()

    async def Route(self, request: pb.RouteRequest, context: Any) -> pb.RouteResponse:
        """Where a request goes."""
        served, kind, caller = await self._now(), request.WhichOneof("request"), CALLER.get()
        if kind is None:
            raise AdapterError("request: holds neither text, embedding nor task; give one of them")
        if kind == "task":
            caller.permit(request.task)
            _known(request.task, served.seen_by(caller))
        found = await self.work(self._route, served, served.seen_by(caller).cards, request)
        return _answer(found, served)

    async def Cards(self, request: pb.CardsRequest, context: Any) -> AsyncIterator[pb.CardPart]:
        """Each served version, then its card's file."""
        served, store = await self._now(), self.feed.registry.objects.store
        for task in filter(CALLER.get().sees, sorted(served.versions)):
            found = served.versions[task]
            yield pb.CardPart(version=await self.run(self._row, found))
            size = (await self.run(store.sizes, found.digest)).get(FILE, 0) if FILE in found.manifest.files else 0
            for name, start, end, place in files.spans({FILE: size}, 0):
                part = pb.CardPart()
                files.fill(part.chunk, await self.run(store.get, found.digest, name, start, end), place)
                yield part

    async def _now(self) -> Served:
        async with self._renewing:
            await self.feed.look()
            if self._served.generation != self.feed.generation:
                self._served = await self.work(self._served.renewed, self.feed.registry, self.feed.generation)
            return self._served

    async def warm(self, texts: Texts, told: Callable[[bool], Awaitable[None]]) -> None:
        """Have ``texts`` load before the first text comes, as soon as there is a version; ``told`` hears whether it can read. For ever."""
        while True:
            try:
                served = await self._now()
                if served.versions:
                    await self.work(texts.ready, served)
                    await told(True)
            except FedpeftError as fault:
                LOG.error("router: texts cannot be read: %s", fault)
                await told(False)
            await self.feed.newer(self._served.generation)

    def _route(self, served: Served, cards: Mapping[str, RouterCard], request: pb.RouteRequest) -> Found:
        """By the ``cards`` of ``served`` that the caller may see."""
        kind = request.WhichOneof("request")
        if kind == "task":
            return make_router("task", cards).route(Request(request.task))
        if kind == "embedding":
            vector = np.asarray(request.embedding.values, np.float32)
            return make_router(request.router or by_embedding(cards), cards).route(Request.of(vector, request.embedding.encoder))
        if self.texts is None:
            raise AbsentError("router: this server reads no texts (control.embed = false); send an embedding, or route by the Cards")
        return make_router(request.router or "chain", cards).route(self.texts(served, request.text))

    def _row(self, found: Version) -> Row:
        return Row(
            task=found.task,
            number=found.number,
            digest=found.digest,
            action=found.action,
            origin=found.origin[:256],
            created=found.created,
            manifest=found.manifest.to_bytes(),
            signature=self.feed.registry.objects.store.get(found.digest, SIGNATURE),
            served=True,
        )


def _known(task: str, served: Served) -> None:
    if task not in served.versions:
        raise UnknownError(f"task {task!r} has no version here; tasks are {sorted(served.versions)}")


def _answer(found: Found, served: Served) -> pb.RouteResponse:
    parts = [pb.Part(task=task, digest=served.versions[task].digest, weight=weight) for task, weight in sorted(found.weights.items())]
    base = next((version.manifest.base for version in served.versions.values()), "")
    return pb.RouteResponse(
        mixture=parts,
        abstained=not parts,
        reason=found.why,
        score=found.score,
        scores=found.scores,
        base=base,
        router=found.router,
        level=found.level,
    )
