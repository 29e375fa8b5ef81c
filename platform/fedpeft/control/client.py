"""A far control plane as Python objects: `RemoteRegistry` has the verbs of a registry, and streams go on where they broke."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.adapters import Adapter
from fedpeft.adapters.folder import parse, write_folder
from fedpeft.control import transfer
from fedpeft.control.cache import Cache
from fedpeft.control.link import Link
from fedpeft.registry import Registry, Version
from fedpeft.registry.manifest import NAME, SIGNATURE
from fedpeft.v1 import federation_pb2 as federation
from fedpeft.v1 import registry_pb2 as pb
from fedpeft.v1 import router_pb2 as router

if TYPE_CHECKING:
    from fedpeft.registry.version import Head
    from fedpeft.routing import Route, RouterCard


class RemoteRegistry:
    """A registry behind ``link``; versions that are read pass through ``cache``."""

    def __init__(self, link: Link, cache: Cache) -> None:
        self.link, self.cache = link, cache
        self._heads: tuple[str, dict[str, Head]] = ("", {})

    def get(self, ref: str) -> Version:
        """The version that ``ref`` names. Raises `AdapterError` when there is none, `LinkError`, `PolicyError`."""
        return transfer.version(self.link.unary("Registry", "Get", pb.GetRequest(ref=ref)))

    def resolve(self, ref: str) -> str:
        """The digest that ``ref`` names. Raises as `get` does."""
        return self.get(ref).digest

    def heads(self) -> dict[str, Head]:
        """What each task serves now; where nothing changed since the last time, the answer is an etag alone. Raises `LinkError`."""
        answer = self.link.unary("Registry", "Heads", pb.HeadsRequest(etag=self._heads[0]))
        if answer.etag != self._heads[0]:
            self._heads = answer.etag, {head.task: (head.number, head.digest) for head in answer.heads}
        return dict(self._heads[1])

    def tasks(self) -> tuple[str, ...]:
        """Tasks with a version."""
        return tuple(self.heads())

    def served(self) -> dict[str, tuple[Version, RouterCard]]:
        """Each task's current version and its router card, verified. Raises `StorageError`, `LinkError`."""
        return RemoteRouter(self.link).cards()

    def list(self, task: str | None = None) -> tuple[Version, ...]:
        """Every version of ``task``, or of all tasks, oldest first."""
        found: builtins.list[Version] = []
        token = ""
        while True:
            page = self.link.unary("Registry", "List", pb.ListRequest(task=task or "", page_token=token))
            found += [transfer.version(row) for row in page.versions]
            token = page.next_page_token
            if not token:
                return tuple(found)

    def history(self, task: str) -> tuple[dict[str, Any], ...]:
        """The events of ``task``, oldest first."""
        answer = self.link.unary("Registry", "History", pb.HistoryRequest(task=task))
        return tuple(json.loads(line) for line in answer.events)

    def files(self, digest: str) -> dict[str, bytes]:
        """All files of a version, verified: from the cache, or pulled into it. Raises `AdapterError`, `StorageError`, `LinkError`."""
        return transfer.pull(self.link, self.cache, digest)

    def load(self, ref: str) -> Adapter:
        """The adapter that ``ref`` names. Raises as `files` does."""
        return parse(self.files(self.get(ref).digest), ref)

    def export(self, ref: str, folder: Path) -> None:
        """Write the version's files into the new ``folder``. Raises as `files` does."""
        write_folder(folder, dict(self.files(self.get(ref).digest)))

    def push(self, source: Registry, ref: str) -> Version:
        """Publish a version of ``source`` here; what a broken stream brought is not sent again.

        Raises:
            AdapterError, StorageError, BaseError, PolicyError: it is refused, there or already here; nothing is published.
            LinkError: the server cannot be reached for too long; the same call goes on.
        """
        found = source.get(ref)
        data = source.files(found.digest)
        return transfer.push(self.link, data[NAME], data[SIGNATURE], {name: data[name] for name in sorted(found.manifest.files)})

    def rollback(self, task: str, ref: str) -> Version:
        """Serve an earlier version again; not repeated by itself, since each call is an event."""
        return transfer.version(self.link.unary("Registry", "Rollback", pb.RollbackRequest(task=task, ref=ref)))

    def alias(self, task: str, name: str, ref: str) -> pb.Alias:
        """Point an alias at a version."""
        return self.link.unary("Registry", "SetAlias", pb.SetAliasRequest(task=task, alias=name, ref=ref))  # type: ignore[no-any-return]

    def aliases(self, task: str) -> dict[str, str]:
        """Digest by alias."""
        found = self.link.unary("Registry", "Aliases", pb.AliasesRequest(task=task))
        return {row.alias: row.digest for row in found.aliases}

    def watch(self, tasks: tuple[str, ...] = (), from_start: bool = False) -> Iterator[pb.Change]:
        """Events and moves as they happen, each once, through broken connections; ends when the caller stops asking."""
        request = pb.WatchRequest(tasks=tasks, from_start=from_start)
        yield from self.link.forever("Registry", "Watch", request, lambda seen: request.seen[seen.task].CopyFrom(seen.seen))


class RemoteRouter:
    """The router behind ``link``."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def route(self, request: router.RouteRequest) -> router.RouteResponse:
        """The mixture for a text, an embedding or a task."""
        return self.link.unary("Router", "Route", request, seconds=120.0)  # type: ignore[no-any-return]

    def ask(self, text: str, task: str | None = None, kind: str = "") -> Route:
        """Where ``text`` goes by the far router ``kind`` (empty: its default), or to ``task``. Raises as `Link.unary` does."""
        from fedpeft.routing import Route

        said = self.route(router.RouteRequest(task=task) if task else router.RouteRequest(text=text, router=kind))
        weights = {part.task: part.weight for part in said.mixture}
        return Route(weights, said.score, dict(said.scores), said.router, said.reason, said.level)  # type: ignore[arg-type]

    def cards(self) -> dict[str, tuple[Version, RouterCard]]:
        """Served version and router card by task, verified: to route without asking. Raises `StorageError`, `LinkError`."""
        return transfer.cards(self.link.stream("Router", "Cards", router.CardsRequest()))


class RemoteFederation:
    """The federation behind ``link``."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def status(self) -> federation.StatusResponse:
        """How it stands."""
        return self.link.unary("Federation", "Status", federation.StatusRequest())  # type: ignore[no-any-return]

    def events(self, position: int = 0, follow: bool = False) -> Iterator[federation.Event]:
        """What happened from ``position`` on, and with ``follow`` what happens."""
        request = federation.EventsRequest(position=position, follow=follow)
        if not follow:
            yield from self.link.stream("Federation", "Events", request)
            return
        yield from self.link.forever("Federation", "Events", request, lambda event: setattr(request, "position", event.position))
