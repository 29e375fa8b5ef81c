"""A real worker takes the cluster that fits its rows, says nothing else, and refuses what is not its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedpeft import config
from fedpeft.tasks import Classification
from fedpeft.tensors import Tensors
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_client.config import SiteConfig
from fedpeft_client.worker import Worker

LABELS = ("animal", "tool")
NAMES = ("kinds.0", "kinds.1")


@pytest.fixture
def clusters(plans: Any) -> tuple[list[Any], dict[str, Tensors]]:
    """Two clusters of task kinds: one whose head says the right thing on average, one that is as wrong as the first is right."""
    table = json.dumps(config.describe(Classification("kinds", LABELS)))
    arrays, asked = {}, []
    for place, name in enumerate(NAMES):
        start = plans.start(name)
        named = {key: value.copy() for key, value in start.named().items()}
        for key in named:
            if key.endswith("classifier.bias"):
                named[key][...] = (0.0, 0.0) if place else (9.0, -9.0)
        arrays[name] = Tensors.from_named(start.layout, named)
        asked.append(plans.of(name, task_json=table, adapter_digest=arrays[name].digest))
    return asked, arrays


def test_the_cluster_of_less_loss_is_taken_and_nothing_else_told(
    site: SiteConfig, make_worker: Callable[[SiteConfig], Worker], plans: Any, clusters: Any
) -> None:
    asked, arrays = clusters
    reply = make_worker(site).handle(plans.message(*asked, kind="choose", arrays=arrays))
    results = plans.results(reply)
    assert results["kinds.1"].status == TaskResult.STATUS_OK
    assert results["kinds.0"].status == TaskResult.STATUS_REFUSED
    assert not reply.arrays
    assert not any(result.counters or result.weight for result in results.values())
    lines = [json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["choose", "choose"]


def test_the_rows_are_then_trained_under_the_clusters_name(
    site: SiteConfig, make_worker: Callable[[SiteConfig], Worker], plans: Any, clusters: Any
) -> None:
    asked, arrays = clusters
    reply = make_worker(site).handle(plans.message(asked[1], arrays={NAMES[1]: arrays[NAMES[1]]}))
    result = plans.results(reply)["kinds.1"]
    assert result.status == TaskResult.STATUS_OK, result.reason
    assert result.counters["train.examples"].values[0] == 12


def test_policy_and_names_are_checked(site: SiteConfig, make_worker: Callable[[SiteConfig], Worker], plans: Any, clusters: Any) -> None:
    asked, arrays = clusters
    closed = site.model_copy(update={"policy": site.policy.model_copy(update={"tasks": ("more",)})})
    results = plans.results(make_worker(closed).handle(plans.message(*asked, kind="choose", arrays=arrays)))
    assert {result.status for result in results.values()} == {TaskResult.STATUS_REFUSED}
    assert "asked 'kinds', allowed ['more']" in results["kinds.0"].reason
    stranger = plans.of("other.0", task_json=asked[0].task_json)
    results = plans.results(make_worker(site).handle(plans.message(stranger, kind="choose")))
    assert results["other.0"].status == TaskResult.STATUS_FAILED
    assert "a plan speaks of one task" in results["other.0"].reason


def test_a_missing_adapter_asks_for_all_alternatives(
    site: SiteConfig, make_worker: Callable[[SiteConfig], Worker], plans: Any, clusters: Any
) -> None:
    asked, arrays = clusters
    asked[0].previous_digest = "0" * 64
    asked[0].down_roles.append("head")
    part = arrays["kinds.0"].pick({"head"})
    results = plans.results(make_worker(site).handle(plans.message(*asked, kind="choose", arrays={**arrays, "kinds.0": part})))
    assert {result.status for result in results.values()} == {TaskResult.STATUS_MISSING_VERSION}


def test_a_policy_that_wants_masks_lets_a_choice_pass(
    site: SiteConfig, make_worker: Callable[[SiteConfig], Worker], plans: Any, clusters: Any
) -> None:
    asked, arrays = clusters
    masked = site.model_copy(update={"policy": site.policy.model_copy(update={"require_secure_aggregation": True})})
    results = plans.results(make_worker(masked).handle(plans.message(*asked, kind="choose", arrays=arrays)))
    assert results["kinds.1"].status == TaskResult.STATUS_OK
