"""Training answered in a codec: what leaves, what stays, and plans whose codec cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeft import config
from fedpeft.schemes import SCHEMES
from fedpeft.tensors import Layout
from fedpeft.update import Grid
from fedpeft.wire.codecs import CODECS, DeltaCodec, Int8, Lanes, Ring
from fedpeft.wire.codecs.ring import packed_size
from fedpeft.wire.v1.federation_pb2 import Masking, TaskPlan, TaskResult
from fedpeft_client import rounds
from fedpeft_client.config import SiteConfig
from fedpeft_client.dry_run import Plain, forecast
from fedpeft_client.worker import Worker

MakeWorker = Callable[[SiteConfig], Worker]
KINDS = ["bf16", "int8", "int4", "int3", "int2", "nf4", "topk", "onebit"]


def told(kind: str | dict) -> str:
    return json.dumps(config.describe(config.build(CODECS, kind, "codec")))


def heard(plans, reply, codec: DeltaCodec, up) -> np.ndarray:
    """What the coordinator decodes of an answer."""
    array = reply.array("kinds", up.fingerprint)
    assert array.dtype == np.uint8
    return codec.decode(array.data, up.size)


def elsewhere(site: SiteConfig, folder: Path) -> SiteConfig:
    return site.model_copy(update={"state": folder})


def residual(worker: Worker, number: int) -> dict[str, np.ndarray]:
    return {name: values for name, values in worker.personal.at(("f", "r"), "kinds", number).values.items() if name.startswith("residual/")}


@pytest.mark.parametrize("kind", KINDS)
def test_delta_and_residual_are_what_training_gave(site: SiteConfig, make_worker: MakeWorker, plans, tmp_path: Path, kind: str) -> None:
    plain = make_worker(elsewhere(site, tmp_path / "plain")).handle(plans.message(plans.of()))
    worker, up, codec = make_worker(site), plans.spec().layout.subset({"B", "head"}), config.build(CODECS, kind, "codec")
    reply = worker.handle(plans.message(plans.of(codec_json=told(kind))))
    result = plans.results(reply)["kinds"]
    assert result.status == TaskResult.STATUS_OK, result.reason
    assert result.weight == plans.results(plain)["kinds"].weight
    assert len(reply.arrays["kinds"]) < len(plain.arrays["kinds"])
    delta = plain.array("kinds", up.fingerprint) * Grid(3).step / result.weight
    kept = residual(worker, 1)
    assert set(kept) == {"residual/B", "residual/head"}
    whole = heard(plans, reply, codec, up) + np.concatenate([kept["residual/B"], kept["residual/head"]])
    np.testing.assert_allclose(whole, delta, atol=Grid(3).step / result.weight)


def ring_plan(plans, bits: int = 4, **changes) -> tuple[Lanes, Layout, TaskPlan]:
    """A plan on scales as a coordinator makes them of what training can move."""
    up, ring = plans.spec().layout.subset({"B", "head"}), Ring(bits, 64)
    scales = ring.shifts(np.full(up.size, 1e-3, np.float32), Grid(3)).tobytes()
    lanes = Lanes.told(up, up.roles, ring, scales, Grid(3))
    return lanes, up, plans.of(codec_json=told({"kind": "ring", "bits": bits, "block": 64}), scales=scales, **changes)


def test_a_ring_narrows_on_the_plans_scales_and_keeps_what_it_loses(site: SiteConfig, make_worker: MakeWorker, plans, tmp_path) -> None:
    plain = make_worker(elsewhere(site, tmp_path / "plain")).handle(plans.message(plans.of()))
    lanes, up, plan = ring_plan(plans)
    worker = make_worker(site)
    reply = worker.handle(plans.message(plan))
    result = plans.results(reply)["kinds"]
    assert result.status == TaskResult.STATUS_OK, result.reason
    sent = reply.array("kinds", up.fingerprint)
    assert sent.nbytes == lanes.alone.bytes() == packed_size(up.size, 4)
    codes = lanes.alone.grow(lanes.alone.read(sent), 1)
    kept, step = residual(worker, 1), Grid(3).step / result.weight
    whole = codes * step + np.concatenate([kept["residual/B"], kept["residual/head"]])
    np.testing.assert_allclose(whole, plain.array("kinds", up.fingerprint) * step, rtol=1e-6, atol=step)
    line = json.loads((site.state / "audit.jsonl").read_text().splitlines()[-1])
    assert sum(line["tensors"].values()) == pytest.approx(sent.nbytes, abs=4)
    again = make_worker(site).handle(plans.message(plan))
    assert again.arrays == reply.arrays


def test_a_residual_is_sent_later_when_its_round_counted_and_only_then(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, told_json = make_worker(site), told({"kind": "topk", "fraction": 0.01})
    fedavg = {"scheme": {"kind": "fedavg"}, "codec_json": told_json}
    worker.handle(plans.message(plans.of(**fedavg)))
    first = residual(worker, 1)
    assert set(first) == {"residual/A", "residual/B", "residual/head"}  # none of the probes beside them
    second = worker.handle(plans.message(plans.of(**fedavg, number=2, counted_round=1), number=2))
    lost = worker.handle(plans.message(plans.of(**fedavg, number=2, counted_round=0), number=2))
    assert second.arrays["kinds"] != lost.arrays["kinds"]
    for name, values in residual(worker, 1).items():
        np.testing.assert_array_equal(values, first[name])


def test_a_plan_sent_again_gives_the_same_bytes(site: SiteConfig, make_worker: MakeWorker, plans, tmp_path: Path, monkeypatch) -> None:
    message = plans.message(plans.of(codec_json=told("int4")))
    first = make_worker(site).handle(message)
    assert make_worker(elsewhere(site, tmp_path / "other")).handle(message).arrays == first.arrays
    monkeypatch.setattr(rounds, "train", lambda *_: pytest.fail("trained again"))
    assert make_worker(site).handle(message).arrays == first.arrays


def test_where_a_scheme_makes_its_own_of_parts_nothing_is_kept(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, up = make_worker(site), SCHEMES["flexlora"]().travels(plans.spec().layout, SCHEMES["flexlora"]().phase(1, plans.spec().layout))
    reply = worker.handle(plans.message(plans.of(scheme={"kind": "flexlora"}, codec_json=told("int8"))))
    assert plans.results(reply)["kinds"].status == TaskResult.STATUS_OK, plans.results(reply)["kinds"].reason
    assert np.abs(heard(plans, reply, Int8(), up)).max() > 0
    assert residual(worker, 1) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codec_json": "{"}, "do both sides run one version"),
        ({"codec_json": '{"kind": "int5"}'}, "unknown kind 'int5'"),
        ({"codec_json": '{"kind": "int4", "block": 1}'}, "greater than or equal to 8"),
        ({"codec_json": '{"kind": "ring"}'}, "ring: 0 scales"),
        ({"codec_json": '{"kind": "ring"}', "scales": b"\xff" * 9999}, "ring: 9999 scales up to 255"),
        ({"codec_json": '{"kind": "int4"}', "secure_aggregation": True}, "have no sum"),
        ({"task_blind": True}, "comes without a masked sum"),
        ({"codec_json": '{"kind": "int4"}', "masking": Masking(step=Masking.STEP_VECTOR, name="x")}, ""),
    ],
)
def test_codecs_that_cannot_be_fail_by_name(site: SiteConfig, make_worker: MakeWorker, plans, changes, words) -> None:
    reply = make_worker(site).handle(plans.message(plans.of(**changes)))
    result = plans.results(reply)["kinds"]
    assert result.status != TaskResult.STATUS_OK
    assert words in result.reason
    assert not reply.arrays


def test_the_audit_log_counts_the_bytes_that_left(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    reply = make_worker(site).handle(plans.message(plans.of(codec_json=told("int4"))))
    line = json.loads((site.state / "audit.jsonl").read_text().splitlines()[-1])
    assert abs(sum(line["tensors"].values()) + 64 - len(reply.arrays["kinds"])) <= 2


def test_the_policy_counts_the_codecs_bytes(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    up = plans.spec().layout.subset({"B", "head"})
    policy = site.policy.model_copy(update={"max_upload_mb": 2.0 * up.size / 1e6})
    tight = site.model_copy(update={"policy": policy})
    for codec, status in (("", TaskResult.STATUS_REFUSED), (told("int4"), TaskResult.STATUS_OK)):
        reply = make_worker(tight).handle(plans.message(plans.of(codec_json=codec)))
        assert plans.results(reply)["kinds"].status == status


@pytest.mark.parametrize(("codec", "bits"), [("int4", 6), ({"kind": "ring", "bits": 6}, 8), ("none", 32)])
def test_the_forecast_under_masks_is_of_the_sums_bits(site: SiteConfig, codec, bits: int) -> None:
    tasks = {"kinds": {"kind": "classification", "labels": ["animal", "tool"]}}
    table = {"name": "f", "tasks": tasks, "method": {"kind": "lora", "r": 4}, "cohort": {"min_sites": 3}, "wire": {"codec": codec}}
    (one,) = forecast(site, config.parse(table, Plain, "federation.toml"))
    values = sum(int(np.prod(line.shape)) for line in one.tensors)
    assert one.bytes == packed_size(values, bits) + 64 + 4 * 21
    assert one.masked


@pytest.mark.parametrize("kind", ["none", "int8", "onebit"])
def test_the_forecast_is_no_less_than_what_leaves(site: SiteConfig, make_worker: MakeWorker, plans, kind: str) -> None:
    tasks = {"kinds": {"kind": "classification", "labels": ["animal", "tool"]}}
    table = {"name": "f", "tasks": tasks, "method": {"kind": "lora", "r": 4}, "training": {"steps": 2}, "wire": {"codec": kind}}
    (one,) = forecast(site, config.parse(table, Plain, "federation.toml"))
    reply = make_worker(site).handle(plans.message(plans.of(codec_json="" if kind == "none" else told(kind))))
    counters = plans.results(reply)["kinds"].counters.values()
    left = len(reply.arrays["kinds"]) + 8 * sum(len(values.values) for values in counters)
    assert left <= one.bytes
    assert one.bytes < left * 1.35
    assert abs(sum(line.bytes for line in one.tensors) + 64 - one.bytes) <= 8 * sum(len(v.values) for v in counters) + len(one.tensors)
