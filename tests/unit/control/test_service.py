"""The services over a real socket: what they answer, and what they say to bad input. Nothing is published by a refused call."""

from __future__ import annotations

import threading
from dataclasses import replace

import grpc
import grpc.aio
import numpy as np
import pytest

from fedpeft.control.client import RemoteFederation, RemoteRouter
from fedpeft.errors import AdapterError, BaseError, LinkError, PolicyError, StorageError
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import Request, make_router
from fedpeft.serving.catalog import Catalog
from fedpeft.v1 import registry_pb2 as pb
from fedpeft.v1 import router_pb2 as router
from fedpeft.v1.registry_pb2_grpc import RegistryStub
from fedpeft_coordinator.control import registry as service
from fedpeft_coordinator.control.router import Texts
from fedpeft_coordinator.control.serve import TEXTS

pytestmark = pytest.mark.integration


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


def test_health_says_when_texts_can_be_read(serve, made, tmp_path):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    registry, gate, loads = Registry(tmp_path / "texts"), threading.Event(), []

    class Slow(Texts):
        def ready(self, served):
            assert gate.wait(30)
            loads.append(sorted(served.versions))
            if "kind" in served.versions:
                raise BaseError("no such encoder here")

    running = serve(registry, texts=Slow(registry))
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        asked = health_pb2.HealthCheckRequest(service=TEXTS)
        states = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=30)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        made.fill(registry, 1)
        gate.set()
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        made.fill(registry, 3, task="kind")
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert loads == [["area"], ["area", "kind"]]


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


def test_what_changes_nothing_is_asked_again_and_a_rollback_is_not(running, far):
    running.server.gate.slots |= {"Get": (0, 0), "Rollback": (0, 0)}
    threading.Timer(0.7, lambda: running.server.gate.slots.update(Get=(9, 9))).start()
    assert far.get("area").number == 2
    threading.Timer(0.7, lambda: running.server.gate.slots.update(Rollback=(9, 9))).start()
    with pytest.raises(LinkError, match="try again soon"):
        far.rollback("area", "1")
    assert len(running.registry.history("area")) == 2


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
