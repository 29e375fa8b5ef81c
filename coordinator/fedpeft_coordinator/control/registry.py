"""The service ``fedpeft.v1.Registry``: versions out in checksummed streams, versions in through a landing and a judge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fedpeft.control import bounds, files
from fedpeft.control.changes import Places, as_alias, as_row
from fedpeft.control.faults import UnknownError
from fedpeft.control.staging import Landing, Staging
from fedpeft.errors import AdapterError, FedpeftError, LinkError, StorageError
from fedpeft.registry import Manifest, Registry, Version
from fedpeft.registry.aliases import Move
from fedpeft.registry.judging import check_base, check_files, check_signer
from fedpeft.registry.log import Entry
from fedpeft.registry.manifest import SIGNATURE, sha256
from fedpeft.registry.store import Landed
from fedpeft.v1 import registry_pb2 as pb
from fedpeft.v1.registry_pb2_grpc import RegistryServicer
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.control.feed import Feed, Run
from fedpeft_coordinator.control.gate import CALLER, STALL, StalledError
from fedpeft_coordinator.control.scopes import seen_by

PAGE_SIZE, MOST_ROWS = 100, 500


class RegistryService(RegistryServicer):
    """Serves ``feed.registry``; ``run`` is for short work on files, ``work`` for long (hashing, judging)."""

    def __init__(self, feed: Feed, control: Control, staging: Staging, run: Run, work: Run) -> None:
        self.feed, self.control, self.staging = feed, control, staging
        self.run, self.work = run, work

    @property
    def registry(self) -> Registry:
        """What the present caller sees."""
        return seen_by(CALLER.get(), self.feed.registry)

    @property
    def _base(self) -> str:
        """What pushed versions must be for: whatever the caller sees."""
        return self.control.base or self.feed.registry.base()

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:
        """A page of versions."""
        return await self.run(self._page, request)  # type: ignore[no-any-return]

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.Version:
        """One version."""
        return await self.run(lambda: self._message(self._find(request.ref)))  # type: ignore[no-any-return]

    async def Heads(self, request: pb.HeadsRequest, context: Any) -> pb.HeadsResponse:
        """What each task serves now, from the histories that the feed has read."""
        found, caller = await self.feed.look(), CALLER.get()
        last = {task: entries[-1] for task, (entries, _) in sorted(found.items()) if caller.sees(task)}
        answer = pb.HeadsResponse(heads=[pb.Head(task=task, number=entry.number, digest=entry.digest) for task, entry in last.items()])
        etag = sha256(answer.SerializeToString(deterministic=True))
        return pb.HeadsResponse(etag=etag, heads=[] if etag == request.etag else answer.heads)

    async def History(self, request: pb.HistoryRequest, context: Any) -> pb.HistoryResponse:
        """A task's events, the youngest that fit a message."""
        events = await self.run(_found, self.registry.history, request.task)
        lines = [json.dumps(event, sort_keys=True) for event in events]
        size, kept = 0, len(lines)
        while kept and size + len(lines[kept - 1]) < bounds.PAGE:
            kept -= 1
            size += len(lines[kept])
        return pb.HistoryResponse(events=lines[kept:], cut=kept > 0)

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[pb.PullPart]:
        """Head and chunks; the next chunk is read while one is sent."""
        found, sizes = await self.run(self._open, request.ref)
        offset = request.offset if request.offset <= sum(sizes.values()) else 0
        head = await self.run(self._message, found)
        yield pb.PullPart(head=pb.PullHead(version=head, files=files.to_proto(sizes), offset=offset))
        spans = iter(files.spans(sizes, offset))
        coming = asyncio.create_task(self._read(found.digest, spans))
        try:
            while (part := await coming) is not None:
                coming = asyncio.create_task(self._read(found.digest, spans))
                yield part
        finally:
            coming.cancel()

    async def Staged(self, request: pb.StagedRequest, context: Any) -> pb.StagedResponse:
        """Where an earlier push stopped."""
        sizes = files.from_proto(request.files, self.control.max_version)
        try:
            known = await self.run(self._find, request.digest)
            return pb.StagedResponse(published=await self.run(self._message, known))
        except UnknownError:
            return pb.StagedResponse(offset=await self.run(self.staging.here, _place(request.digest), sizes))

    async def Push(self, parts: AsyncIterator[pb.PushPart], context: Any) -> pb.Version:
        """Judge the head, take the chunks, judge the whole, publish."""
        head = (await _next(parts) or pb.PushPart()).head
        manifest, sizes = await self.run(self._vetted, head)
        async with self._landing(_place(manifest.digest), sizes) as landing:
            offset = await self.run(lambda: landing.offset)
            while (part := await _next(parts)) is not None:
                offset = await self.run(landing.write, part.chunk, offset)
            ready = await self.work(landing.complete, manifest.files)
            version = await self.work(self._accept, manifest, ready, head)
        await self.feed.look()
        return await self.run(self._message, version)  # type: ignore[no-any-return]

    async def Rollback(self, request: pb.RollbackRequest, context: Any) -> pb.Version:
        """An event that points back."""
        version = await self.run(_found, self.registry.rollback, request.task, request.ref)
        await self.feed.look()
        return await self.run(self._message, version)  # type: ignore[no-any-return]

    async def Aliases(self, request: pb.AliasesRequest, context: Any) -> pb.AliasesResponse:
        """Where aliases point."""
        return pb.AliasesResponse(aliases=await self.run(self._aliases, request.task))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Any) -> pb.Alias:
        """A signed move."""
        move = await self.run(self._move, request, CALLER.get().label)
        await self.feed.look()
        return as_alias(move)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Change]:
        """Changes after the places that the caller names."""
        await self.feed.look()
        caller, generation = CALLER.get(), self.feed.generation
        caller.permit(*request.tasks)
        seen = {task: (place.events, place.moves) for task, place in request.seen.items()}
        places = Places(frozenset(request.tasks) or caller.tasks or frozenset(), seen)
        if not request.from_start:
            places.begin(self.feed.snapshot)
        while True:
            for change in places.news(self.feed.snapshot):
                yield change
            generation = await self.feed.newer(generation)

    def _find(self, ref: str) -> Version:
        return _found(self.registry.get, ref)  # type: ignore[no-any-return]

    def _open(self, ref: str) -> tuple[Version, dict[str, int]]:
        found = self._find(ref)
        there = self.registry.objects.store.sizes(found.digest)
        missing = sorted(set(found.manifest.files) - set(there))
        if missing:
            raise StorageError(f"version {found.digest[:12]}: {missing} are missing here; its operator may publish it again")
        return found, {name: there[name] for name in sorted(found.manifest.files)}

    def _message(self, version: Version) -> pb.Version:
        row = as_row(version.task, Entry(version.number, version.action, version.digest, version.origin, version.created))
        row.manifest = version.manifest.to_bytes()
        row.signature = self.registry.objects.store.get(version.digest, SIGNATURE)
        row.served = self.registry.events(version.task)[-1].digest == version.digest
        return row

    async def _read(self, digest: str, spans: Iterator[tuple[str, int, int, int]]) -> pb.PullPart | None:
        span = next(spans, None)
        return None if span is None else await self.run(self._chunk, digest, span)

    def _chunk(self, digest: str, span: tuple[str, int, int, int]) -> pb.PullPart:
        name, start, end, place = span
        data = self.registry.objects.store.get(digest, name, start, end)
        if len(data) != end - start:
            raise StorageError(f"version {digest[:12]}: {name} is shorter here than it was; its operator may publish it again")
        part = pb.PullPart()
        files.fill(part.chunk, data, place)
        return part

    def _page(self, request: pb.ListRequest) -> pb.ListResponse:
        tasks = self.registry.tasks() if not request.task else (request.task,)
        after_task, _, after = request.page_token.rpartition("@")
        if request.page_token and not (after.isdecimal() and after_task):
            raise AdapterError(f"page_token {request.page_token!r}: is none of ours; begin without one")
        most, size, answer = min(request.page_size or PAGE_SIZE, MOST_ROWS), 0, pb.ListResponse()
        for task, entry in ((t, e) for t in tasks if t >= after_task for e in _found(self.registry.events, t) if e.action != "rollback"):
            if task == after_task and entry.number <= int(after):
                continue
            row = self._message(self.registry.at(task, entry))
            size += row.ByteSize()
            if len(answer.versions) == most or (answer.versions and size > bounds.PAGE):
                answer.next_page_token = f"{answer.versions[-1].task}@{answer.versions[-1].number}"
                break
            answer.versions.append(row)
        return answer

    def _vetted(self, head: pb.PushHead) -> tuple[Manifest, dict[str, int]]:
        """What can be refused before a byte is taken."""
        bounds.check(head)
        manifest = Manifest.from_bytes(head.manifest)
        if manifest.digest != sha256(head.manifest):
            raise AdapterError("manifest: is not in its canonical form; publish the version anew")
        sizes = files.from_proto(head.files, self.control.max_version)
        CALLER.get().permit(manifest.task)
        check_signer(manifest, head.signature, self.registry.objects.keys)
        check_base(manifest, self._base)
        check_files(manifest, set(sizes))
        return manifest, sizes

    @asynccontextmanager
    async def _landing(self, name: str, sizes: files.Sizes) -> AsyncIterator[Landing]:
        """A landing that keeps what a broken stream brought and nothing else."""
        await self.run(self.staging.sweep)
        async with AsyncExitStack() as stack:
            held = self.staging.landing(name, sizes)
            landing = await self.run(held.__enter__)
            stack.callback(held.__exit__, None, None, None)
            try:
                yield landing
            except LinkError:
                raise
            except FedpeftError:
                await self.run(landing.forget)
                raise
            await self.run(landing.forget)

    def _accept(self, manifest: Manifest, ready: Mapping[str, Landed], head: pb.PushHead) -> Version:
        return self.registry.accept(manifest, ready, head.signature, head.origin or f"push/{manifest.digest}", self._base)

    def _aliases(self, task: str) -> list[pb.Alias]:
        rows = []
        for name in (task,) if task else self.registry.tasks():
            _found(self.registry.events, name)
            held, last = self.registry.aliases(name), {move.alias: move for move in self.registry.moves(name)}
            rows += [as_alias(last[name]) for name in held]
        return rows

    def _move(self, request: pb.SetAliasRequest, by: str) -> Move:
        _found(self.registry.events, request.task)
        return self.registry.alias(request.task, request.alias, request.ref, by)


def _found(ask: Any, *what: str) -> Any:
    """What ``ask`` answers; an `AdapterError` means that there is no such thing."""
    try:
        return ask(*what)
    except AdapterError as fault:
        raise UnknownError(str(fault)) from None


def _place(digest: str) -> str:
    """The landing of a version by the present caller; nobody goes on with another's stream."""
    return f"{sha256(digest.encode())[:32]}-{sha256(CALLER.get().label.encode())[:16]}"


async def _next(parts: AsyncIterator[pb.PushPart]) -> pb.PushPart | None:
    try:
        async with asyncio.timeout(STALL):
            part = await anext(parts, None)
    except TimeoutError:
        raise StalledError(f"nothing came for {STALL:.0f} s; go on where it stopped") from None
    if part is not None:
        bounds.check(part)
    return part
