"""A caller whose scope is some tasks: the others are not there for it, whatever it calls; without a setting everybody sees all."""

from __future__ import annotations

from itertools import islice

import pytest

from fedpeft import config
from fedpeft.control.client import RemoteFederation, RemoteRouter
from fedpeft.errors import AdapterError, ConfigError, PolicyError
from fedpeft.registry import Registry
from fedpeft.v1 import router_pb2 as router
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.control.federation import _within
from fedpeft_coordinator.control.gate import Caller

pytestmark = pytest.mark.integration


@pytest.fixture
def running(serve, made):
    found = serve(scopes={"operator": ("area",)})
    made.fill(found.registry, 1, 2)
    made.fill(found.registry, 3, task="verb")
    return found


@pytest.fixture
def far(running, tmp_path):
    with (one := running.far(tmp_path / "cache")).link:
        yield one


def test_what_is_out_of_scope_is_refused_by_every_call(running, far, made, tmp_path):
    near, other = running.registry, Registry(tmp_path / "other")
    made.fill(other, 5, task="verb")
    near.objects.keys.trust(other.objects.keys.public())
    before = near.history("verb")
    for call in (
        lambda: far.get("verb"),
        lambda: far.get("unheard-of"),
        lambda: far.list("verb"),
        lambda: far.history("verb"),
        lambda: far.aliases("verb"),
        lambda: far.alias("verb", "prod", "1"),
        lambda: far.rollback("verb", "1"),
        lambda: far.push(other, "verb"),
        lambda: next(far.watch(("verb",), from_start=True)),
        lambda: RemoteRouter(far.link).ask("", "verb"),
        lambda: list(RemoteFederation(far.link).events()),
    ):
        with pytest.raises(PolicyError, match=r"operator:anonymous may see .*\['area'\] only.*control\.scopes"):
            call()
    for ref in (near.resolve("verb"), f"sha256:{near.resolve('verb')[:12]}"):
        with pytest.raises(AdapterError, match="no such version"):
            far.files(ref)
    assert near.history("verb") == before
    assert not (running.server.state / "staging").exists()


def test_what_is_in_scope_is_all_that_is_told(running, far, made, tmp_path):
    near, other = running.registry, Registry(tmp_path / "other")
    made.fill(other, 5)
    near.objects.keys.trust(other.objects.keys.public())
    assert set(far.heads()) == {version.task for version in far.list()} == {"area"}
    assert set(far.served()) == {"area"}
    assert [change.task for change in islice(far.watch(from_start=True), 2)] == ["area", "area"]
    found = RemoteRouter(far.link).route(router.RouteRequest(embedding=router.Embedding(values=[0, 0, 1, 1, 0, 0, 0, 0])))
    assert set(found.scores) == {"area"}
    assert far.load("area").digest == near.load("area").digest
    assert (far.push(other, "area").number, far.rollback("area", "1").number) == (3, 4)
    far.alias("area", "prod", "2")
    assert far.aliases("") == {"prod": near.resolve("area@2")}


def test_a_name_comes_before_its_role_and_a_status_is_cut_to_the_scope(running):
    running.server.gate.scopes = {"reader": frozenset({"area"}), "reader:ann": frozenset({"verb"})}
    scoped = running.server.gate._scoped
    assert [scoped(Caller("reader", name)).tasks for name in ("bob", "ann")] == [{"area"}, {"verb"}]
    assert scoped(Caller("site", "clinic")).tasks is None
    site = {"tasks": {"area": 4, "verb": 5}, "last_drop_out": "round 1, verb: slow"}
    found = {"federation": "f", "tasks": {"area": 1, "verb": 2}, "sites": {"north": site}}
    assert _within(Caller("monitor", "m"), found) is found
    cut = {"federation": "f", "tasks": {"area": 1}, "sites": {"north": {"tasks": {"area": 4}, "last_drop_out": ""}}}
    assert _within(Caller("monitor", "m", frozenset({"area"})), found) == cut


def test_a_scope_is_a_caller_and_its_tasks():
    assert config.parse({"scopes": {"site:clinic": ["area"]}}, Control, "c").scopes == {"site:clinic": ("area",)}
    for wrong in ({"clinic": ["area"]}, {"site:": ["area"]}, {"site": []}):
        with pytest.raises(ConfigError, match="scopes"):
            config.parse({"scopes": wrong}, Control, "c")
