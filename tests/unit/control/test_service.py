"""The services over a real socket: what they answer, and what they say to bad input. Nothing is published by a refused call."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import grpc
import grpc.aio
import numpy as np
import pytest

from fedpeft.control import bounds, files
from fedpeft.control.channel import OPTIONS
from fedpeft.control.client import RemoteFederation, RemoteRouter
from fedpeft.errors import AdapterError, BaseError, LinkError, PolicyError, StorageError
from fedpeft.registry import Manifest, Registry, judging
from fedpeft.registry.manifest import NAME, SIGNATURE
from fedpeft.routing import Request, make_router
from fedpeft.serving.catalog import Catalog
from fedpeft.v1 import registry_pb2 as pb
from fedpeft.v1 import router_pb2 as router
from fedpeft.v1.registry_pb2_grpc import RegistryStub
from fedpeft_coordinator.control import registry as service

pytestmark = pytest.mark.integration


@pytest.fixture
def running(serve, made):
    found = serve()
    made.fill(found.registry, 1, 2)
    return found


@pytest.fixture
def far(running, tmp_path):
    with (one := running.far(tmp_path / "cache")).link:
        yield one


@pytest.fixture
def stub(running):
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", OPTIONS) as channel:
        yield RegistryStub(channel)


@pytest.fixture
def other(running, made, tmp_path):
    """Another registry, which the server trusts, with one large version."""
    found = Registry(tmp_path / "other")
    made.fill(found, 5, width=300_000)
    running.registry.objects.keys.trust(found.objects.keys.public())
    return found


def same(one, two):
    return replace(one, path=None) == replace(two, path=None)


def test_a_far_registry_says_what_the_near_one_says(running, far, made, monkeypatch):
    near = running.registry
    made.fill(near, 3, task="kind")
    for ref in ("area", "area@1", "area@latest", "kind", f"sha256:{near.resolve('area')[:12]}", near.resolve("area@1")):
        assert same(far.get(ref), near.get(ref))
    monkeypatch.setattr(service, "PAGE_SIZE", 2)
    assert all(same(*pair) for pair in zip(far.list(), near.list(), strict=True))
    assert [version.number for version in far.list("area")] == [1, 2]
    assert far.history("area") == near.history("area")
    assert far.load("area").digest == made.adapter(2).digest
    assert far.rollback("area", "1").action == "rollback"
    assert near.resolve("area") == near.resolve("area@1")
    far.alias("area", "prod", "2")
    assert far.aliases("area") == near.aliases("area") == {"prod": near.resolve("area@2")}
    assert same(far.get("area@prod"), near.get("area@2"))


@pytest.fixture
def counted(far, monkeypatch):
    """Calls of the far registry from now on: methods, and bytes of what was asked and answered."""
    calls, unary = [], far.link.unary

    def count(what, method, request, **more):
        answer = unary(what, method, request, **more)
        calls.append((method, request.ByteSize() + answer.ByteSize()))
        return answer

    monkeypatch.setattr(far.link, "unary", count)
    return calls


def test_looking_whether_something_is_new_costs_the_same_however_many_versions_there_are(running, far, made, counted):
    made.fill(running.registry, *range(3, 13))
    made.fill(running.registry, 1, task="kind")
    assert far.heads() == running.registry.heads() == {task: (n, running.registry.resolve(task)) for task, n in (("area", 12), ("kind", 1))}
    listed = len(far.list()) and sum(size for _, size in counted[1:])
    del counted[:]
    for _ in range(3):
        assert far.tasks() == ("area", "kind")
    assert counted == [("Heads", 2 * 66)] * 3  # an etag up and an etag down, where a list is kilobytes
    assert listed > 10_000
    running.registry.rollback("area", "1")
    assert far.heads()["area"] == (13, running.registry.resolve("area@1"))
    assert far.heads() == running.registry.heads()


def test_a_catalog_that_is_up_to_date_asks_one_small_thing(running, far, made, counted):
    catalog = Catalog(far, made.base, None)
    catalog.refresh()  # what the task is made of is not told, so nothing can be served, and no more is asked of it
    assert set(catalog.faults) == {"area"}
    del counted[:]
    for _ in range(3):
        assert catalog.refresh() == []
    assert [method for method, _ in counted] == ["Heads"] * 3


def test_a_near_registry_pulls_from_a_far_one(running, far, tmp_path):
    mine = Registry(tmp_path / "mine")
    assert mine.pull(far, "area@1").digest == running.registry.resolve("area@1")
    assert mine.verify() == ()


@pytest.mark.parametrize(
    ("request_", "code", "detail"),
    [
        (pb.GetRequest(ref="verb"), "NOT_FOUND", "task 'verb' has no version"),
        (pb.GetRequest(ref="area@9"), "NOT_FOUND", "versions 1 to 2"),
        (pb.GetRequest(ref="../etc"), "NOT_FOUND", "cannot be stored"),
        (pb.GetRequest(ref="sha256:"), "NOT_FOUND", "no such version"),
        (pb.GetRequest(ref="x" * 300), "INVALID_ARGUMENT", "ref has 300 characters; at most 256"),
        (pb.GetRequest(ref="x" * (5 << 20)), "RESOURCE_EXHAUSTED", "larger than max"),
        (pb.ListRequest(task="verb"), "NOT_FOUND", "has no version"),
        (pb.ListRequest(page_token="junk"), "INVALID_ARGUMENT", "page_token 'junk'"),
        (pb.HistoryRequest(task="verb"), "NOT_FOUND", "has no version"),
        (pb.PullRequest(ref="verb"), "NOT_FOUND", "has no version"),
        (pb.RollbackRequest(task="area", ref="9"), "NOT_FOUND", "versions 1 to 2"),
        (pb.SetAliasRequest(task="verb", alias="prod", ref="1"), "NOT_FOUND", "has no version"),
        (pb.SetAliasRequest(task="area", alias="latest", ref="1"), "INVALID_ARGUMENT", "cannot be set"),
        (pb.AliasesRequest(task="verb"), "NOT_FOUND", "has no version"),
        (pb.WatchRequest(tasks=["t"] * 1001), "INVALID_ARGUMENT", "tasks has 1001 entries"),
        (pb.StagedRequest(digest="a" * 64, files=[pb.File(name="../x", size=1)]), "INVALID_ARGUMENT", "not distinct plain names"),
    ],
)
def test_bad_requests_get_a_status_that_says_why(running, request_, code, detail):
    method = type(request_).__name__.removesuffix("Request")
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", unlimited) as channel, pytest.raises(grpc.RpcError) as caught:
        first(getattr(RegistryStub(channel), method)(request_, timeout=10))
    assert caught.value.code().name == code
    assert detail in caught.value.details()
    assert [version.number for version in running.registry.list()] == [1, 2]


def first(answer):
    return next(answer) if hasattr(answer, "__next__") else answer


def parts(source, ref="area", change=lambda _place, data: data, **head):
    """The messages of a push."""
    found = source.get(ref)
    held = source.files(found.digest)
    content = {name: held[name] for name in sorted(found.manifest.files)}
    sizes = {name: len(data) for name, data in content.items()}
    values = {"manifest": held[NAME], "signature": held[SIGNATURE], "files": files.to_proto(sizes), **head}
    yield pb.PushPart(head=pb.PushHead(**values))
    for name, start, end, place in files.spans(sizes, 0):
        part = pb.PushPart()
        files.fill(part.chunk, change(place, content[name][start:end]), place)
        yield part


def refused(running, stub, messages, code):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Push(iter(messages), timeout=30)
    assert caught.value.code().name == code, caught.value.details()
    assert len(running.registry.list()) == 2
    assert len(running.registry.objects.store.names()) == 2
    return caught.value.details()


def staged(running):
    return sorted(path.name for path in (running.server.state / "staging").glob("*/*") if path.name != ".lock")


def test_a_push_is_published_once_with_its_signature(running, far, other, monkeypatch):
    monkeypatch.setattr(judging, "sha256", lambda _data: 1 / 0)  # what was hashed as it came is not hashed again
    pushed = far.push(other, "area")
    assert (pushed.number, pushed.action, pushed.digest) == (3, "push", other.resolve("area"))
    assert same(far.push(other, "area"), pushed)
    assert running.registry.load("area").digest == other.load("area").digest
    assert running.registry.verify() == ()
    assert staged(running) == []


def test_a_truncated_push_publishes_nothing_and_goes_on_where_it_stopped(running, far, stub, other):
    whole = list(parts(other))
    assert "ended after" in refused(running, stub, whole[:3], "UNAVAILABLE")
    sizes = [message.chunk for message in whole[1:3]]
    here = stub.Staged(pb.StagedRequest(digest=other.resolve("area"), files=whole[0].head.files))
    assert here.offset == sum(len(chunk.data) for chunk in sizes) > 0
    assert "expected place" in refused(running, stub, whole, "UNAVAILABLE"), "what is here is not taken again"
    assert far.push(other, "area").number == 3
    assert staged(running) == []


def test_what_was_tampered_with_is_refused_and_forgotten(running, stub, other):
    flipped = list(parts(other))
    flipped[1].chunk.crc ^= 1
    assert "was changed on its way" in refused(running, stub, flipped, "DATA_LOSS")
    lying = parts(other, change=lambda place, data: data[:-1] + bytes([data[-1] ^ 1]) if place else data)
    assert "do not have the SHA-256" in refused(running, stub, lying, "DATA_LOSS")
    assert staged(running) == []
    forged = other.get("area").manifest.to_bytes().replace(b'"round":5', b'"round":6')
    assert "does not match" in refused(running, stub, parts(other, manifest=forged), "PERMISSION_DENIED")
    assert "canonical" in refused(running, stub, parts(other, manifest=other.get("area").manifest.to_bytes() + b" "), "INVALID_ARGUMENT")
    assert "torn" in refused(running, stub, parts(other, manifest=b"{"), "DATA_LOSS")
    assert "torn" in refused(running, stub, [], "DATA_LOSS")


@pytest.mark.parametrize(
    ("size", "code", "detail"),
    [
        (bounds.CHUNK + 1, "INVALID_ARGUMENT", "data has 1048577 bytes; at most 1048576"),
        (bounds.MESSAGE + 1, "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_an_oversized_part_of_a_push_is_refused_and_nothing_that_came_is_lost(running, far, other, size, code, detail):
    whole = list(parts(other))
    huge = pb.PushPart()
    files.fill(huge.chunk, bytes(size), sum(len(part.chunk.data) for part in whole[1:3]))
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.max_send_message_length", -1)]) as channel:
        assert detail in refused(running, RegistryStub(channel), [*whole[:3], huge], code)
    asked = pb.StagedRequest(digest=other.resolve("area"), files=whole[0].head.files)
    kept = far.link.unary("Registry", "Staged", asked).offset
    assert kept == (0 if code == "INVALID_ARGUMENT" else huge.chunk.offset), "what was refused is forgotten, what broke goes on"
    assert far.push(other, "area").number == 3
    assert running.registry.verify() == ()
    assert staged(running) == []


@pytest.mark.parametrize("times", [1, 99])
def test_a_pull_that_is_tampered_with_on_its_way_heals_or_is_not_believed(running, far, other, monkeypatch, times):
    running.registry.pull(other, "area")
    real, left = service.RegistryService._chunk, [times]

    def chunk(self, digest, span):
        part = real(self, digest, span)
        if span[3] and left[0]:
            left[0] -= 1
            part.chunk.data = part.chunk.data[:-1] + bytes([part.chunk.data[-1] ^ 1])
        return part

    monkeypatch.setattr(service.RegistryService, "_chunk", chunk)
    if times == 1:
        assert far.load("area").digest == other.load("area").digest
        return
    with pytest.raises(StorageError, match=r"was changed on its way \(CRC-32"):
        far.load("area")
    assert list(far.cache.root.glob("objects/*")) == []


def test_strangers_other_bases_and_large_versions_are_refused_before_a_byte_is_taken(running, stub, made, other, tmp_path, monkeypatch):
    stranger = Registry(tmp_path / "stranger")
    made.fill(stranger, 7)
    assert "fedpeft adapters trust" in refused(running, stub, parts(stranger), "PERMISSION_DENIED")
    found = made.adapter(8)
    foreign = replace(found, spec=replace(found.spec, base="e" * 64))
    other.publish(foreign, Manifest(), "foreign")
    assert "was trained on base eeeeeeeeeeee" in refused(running, stub, parts(other), "FAILED_PRECONDITION")
    huge = [pb.File(name=name, size=1 << 40) for name in other.get("area").manifest.files]
    assert "control.max_version" in refused(running, stub, parts(other, files=huge), "INVALID_ARGUMENT")
    assert not (running.server.state / "staging").exists()


def test_errors_arrive_as_what_they_were(running, far, other, made, monkeypatch):
    for ask, kind in [
        (lambda: far.get("verb"), AdapterError),
        (lambda: far.alias("area", "latest", "1"), AdapterError),
        (lambda: RemoteFederation(far.link).status(), LinkError),
    ]:
        with pytest.raises(kind):
            ask()
    (running.registry.get("area").path / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"manifest.json"):
        far.get("area")


def test_a_defect_is_internal_and_says_nothing_of_the_inside(running, far, monkeypatch):
    monkeypatch.setattr(Registry, "history", lambda *_a: 1 / 0)
    with pytest.raises(LinkError, match=r"a defect of fedpeft: ZeroDivisionError; the server's log has more \(INTERNAL\)"):
        far.history("area")
    assert far.get("area").number == 2


def test_a_damaged_version_is_not_believed(running, far):
    path = running.registry.get("area").path / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError, match="do not have the SHA-256"):
        far.files(running.registry.resolve("area"))
    assert list(far.cache.root.glob("objects/*")) == []


def test_a_pull_goes_on_from_any_byte(running, stub, other):
    running.registry.pull(other, "area")
    whole = b"".join(part.chunk.data for part in stub.Pull(pb.PullRequest(ref="area")))
    for offset in (0, 1, bounds.CHUNK, len(whole) - 1, len(whole), len(whole) + 1):
        head, *chunks = stub.Pull(pb.PullRequest(ref="area", offset=offset))
        begins = offset if offset <= len(whole) else 0
        assert head.head.offset == begins
        assert b"".join(part.chunk.data for part in chunks) == whole[begins:]
        assert all(len(part.chunk.data) <= bounds.CHUNK for part in chunks)


def test_watchers_see_everything_once_and_go_on_after_what_they_saw(running, far, made):
    seen, started = [], threading.Event()

    def watch():
        for change in far.watch(from_start=True):
            seen.append(change)
            started.set()
            if len(seen) == 6:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    assert started.wait(10)
    made.fill(running.registry, 3, task="kind")
    far.alias("area", "prod", "1")
    running.registry.rollback("area", "1")
    running.registry.alias("area", "prod", "2")
    thread.join(20)
    told = [(change.task, change.WhichOneof("change")) for change in seen]
    assert sorted(told) == [("area", "alias")] * 2 + [("area", "version")] * 3 + [("kind", "version")]
    request = pb.WatchRequest(seen={change.task: change.seen for change in seen[:2]}, tasks=["area"])
    call = RegistryStub(grpc.insecure_channel(f"127.0.0.1:{running.port}")).Watch(request)
    later = [next(call) for _ in range(3)]
    assert [change.WhichOneof("change") for change in later] == ["version", "alias", "alias"]
    call.cancel()


def vector(axis):
    return router.Embedding(values=np.eye(8)[axis].tolist())


def test_requests_are_routed_to_mixtures(running, far, made, serve):
    made.fill(running.registry, 3, task="kind")
    ask = RemoteRouter(far.link).route
    found = ask(router.RouteRequest(embedding=vector(3)))
    assert [(part.task, part.digest, part.weight) for part in found.mixture] == [("kind", running.registry.resolve("kind"), 1.0)]
    assert (found.abstained, found.base, found.router) == (False, made.base, "centroid")
    lost = ask(router.RouteRequest(embedding=vector(6)))
    assert (lost.abstained, len(lost.mixture)) == (True, 0)
    assert lost.reason
    assert [part.task for part in ask(router.RouteRequest(task="area")).mixture] == ["area"]
    running.registry.rollback("area", "1")
    assert ask(router.RouteRequest(task="area")).mixture[0].digest == running.registry.resolve("area@1"), "what is served now"
    for request, kind, fault in [
        (router.RouteRequest(), AdapterError, "neither text, embedding nor task"),
        (router.RouteRequest(task="verb"), AdapterError, "has no version here; tasks are"),
        (router.RouteRequest(embedding=router.Embedding(values=[1.0])), AdapterError, "1 values"),
        (router.RouteRequest(embedding=router.Embedding(values=[float("nan")] * 8)), AdapterError, "finite"),
        (router.RouteRequest(embedding=vector(1), router="oracle"), AdapterError, "not known"),
        (router.RouteRequest(text="hello"), LinkError, "reads no texts"),
    ]:
        with pytest.raises(kind, match=fault):
            ask(request)


def test_texts_are_read_by_the_base_and_cards_route_without_asking(serve, made, tmp_path):
    registry = Registry(tmp_path / "texts")
    made.fill(registry, 1)
    made.fill(registry, 3, task="kind")
    running = serve(registry, texts=lambda _served, text: Request.of(np.eye(8)[len(text)]))
    with running.far(tmp_path / "cache").link as link:
        asked = RemoteRouter(link)
        assert [part.task for part in asked.route(router.RouteRequest(text="abc")).mixture] == ["kind"]
        cards = asked.cards()
    assert {task: version.digest for task, (version, _) in cards.items()} == {task: registry.resolve(task) for task in ("area", "kind")}
    local = make_router("centroid", {task: card for task, (_, card) in cards.items()})
    assert local.route(Request.of(np.eye(8)[1])).task == "area"
    assert cards["kind"][1].arrows.keys() == {"q"}


def test_health_and_reflection(running):
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "fedpeft.v1.Registry", "fedpeft.v1.Router", "fedpeft.v1.Federation"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="none"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"fedpeft.v1.Registry", "fedpeft.v1.Router", "fedpeft.v1.Federation"} <= set(database.get_services())
        assert "Pull" in DescriptorPool(database).FindServiceByName("fedpeft.v1.Registry").methods_by_name


def test_a_reader_that_stalls_is_cut_off_and_blocks_nobody(running, far, stub, other):
    running.registry.pull(other, "area")
    running.server.gate.stall = 0.5
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536), ("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{running.port}", small)
    lazy = [RegistryStub(channel).Pull(pb.PullRequest(ref="area")) for _ in range(20)]
    for call in lazy:
        next(call)
    began = time.monotonic()
    assert far.load("area").digest == other.load("area").digest
    assert time.monotonic() - began < 30, "nobody waits for those who stall"
    while +running.server.gate._busy and time.monotonic() - began < 60:
        time.sleep(0.1)
    assert not +running.server.gate._busy, "every slot is free again"
    codes = set()
    for call in lazy:
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        codes.add(caught.value.code().name)
    channel.close()
    assert codes == {"ABORTED"}


def test_more_calls_than_slots_are_turned_away(running, stub, other, far):
    running.registry.pull(other, "area")
    running.server.gate.slots["Pull"] = (1, 1)
    held = stub.Pull(pb.PullRequest(ref="area"))
    next(held)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Pull(pb.PullRequest(ref="area")))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again soon" in caught.value.details()
    threading.Timer(0.5, held.cancel).start()
    assert far.load("area").digest == other.load("area").digest, "the client waits for a slot"


def test_what_changes_nothing_is_asked_again_and_a_rollback_is_not(running, far):
    running.server.gate.slots |= {"Get": (0, 0), "Rollback": (0, 0)}
    threading.Timer(0.7, lambda: running.server.gate.slots.update(Get=(9, 9))).start()
    assert far.get("area").number == 2
    threading.Timer(0.7, lambda: running.server.gate.slots.update(Rollback=(9, 9))).start()
    with pytest.raises(LinkError, match="try again soon"):
        far.rollback("area", "1")
    assert len(running.registry.history("area")) == 2


def test_two_hundred_pulls_at_once(running, made):
    made.fill(running.registry, 6, width=40_000)
    digest = running.registry.resolve("area")

    async def all_of_them():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", OPTIONS) as channel:
            asked = RegistryStub(channel)

            async def one():
                return sum([len(part.chunk.data) async for part in asked.Pull(pb.PullRequest(ref=digest), timeout=100)])

            return await asyncio.gather(*(one() for _ in range(200)))

    sizes = running.registry.objects.store.sizes(digest)
    manifest = running.registry.get(digest).manifest
    assert asyncio.run(all_of_them()) == [sum(sizes[name] for name in manifest.files)] * 200


def test_changes_and_refusals_are_recorded(serve, made, tmp_path):
    rows = []
    running = serve(
        record=lambda event, **facts: rows.append((event, facts["method"], facts["caller"], facts["outcome"])), anonymous="reader"
    )
    made.fill(running.registry, 1)
    with running.far(tmp_path / "cache").link as link, pytest.raises(PolicyError, match="role 'reader'"):
        link.unary("Registry", "SetAlias", pb.SetAliasRequest(task="area", alias="prod", ref="1"))
    assert [row[:2] for row in rows] == [("call", "fedpeft.v1.Registry/SetAlias")]
    assert rows[0][3].startswith("PERMISSION_DENIED")


def test_a_wrong_base_is_a_base_error_at_the_client(running, far, other, made):
    found = made.adapter(8)
    other.publish(replace(found, spec=replace(found.spec, base="e" * 64)), Manifest(), "foreign")
    with pytest.raises(BaseError, match="train it on the same weights"):
        far.push(other, "area")
