"""The worker: what it answers, from disk and by work, and how one task's fault stays that task's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedpeft import bases, config
from fedpeft.routing.moments import moments
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update
from fedpeft.wire import Envelope, flat
from fedpeft.wire.codecs import Int4, OneBit, tell
from fedpeft.wire.spreads import spread_message
from fedpeft.wire.v1.federation_pb2 import Capabilities, Centroid, Hello, RoundReply, TaskResult
from fedpeft_client import rounds
from fedpeft_client.config import SiteConfig
from fedpeft_client.worker import Worker

OK, REFUSED, FAILED, MISSING = (
    TaskResult.STATUS_OK,
    TaskResult.STATUS_REFUSED,
    TaskResult.STATUS_FAILED,
    TaskResult.STATUS_MISSING_VERSION,
)
MakeWorker = Callable[[SiteConfig], Worker]


def test_hello_is_answered_with_what_the_site_holds(site: SiteConfig, make_worker: MakeWorker, base) -> None:
    reply = make_worker(site).handle(Envelope.of("hello", Hello(federation="f", tasks=["kinds", "more", "other"]))).open(Capabilities)
    assert reply.site == "site-a"
    assert {h.task: (h.train_examples, h.test_examples, h.adapter_digest) for h in reply.holdings} == {
        "kinds": (12, 12, ""),
        "more": (12, 12, ""),
    }
    assert reply.base_identity == base.fingerprint.identity
    assert reply.quantization == "none"
    assert reply.base_loads == bases.LOADS


def test_a_task_whose_rows_cannot_be_read_is_left_out(site: SiteConfig, make_worker: MakeWorker, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").unlink()
    reply = make_worker(site).handle(Envelope.of("hello", Hello(federation="f"))).open(Capabilities)
    assert [h.task for h in reply.holdings] == ["kinds"]


def test_training_answers_an_update_of_the_phase(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    reply = make_worker(site).handle(plans.message(plans.of("kinds"), plans.of("more")))
    found = plans.results(reply)
    assert {task: result.status for task, result in found.items()} == {"kinds": OK, "more": OK}, found
    up = plans.spec().layout.subset({"B", "head"})
    codes = reply.array("kinds", up.fingerprint)
    assert codes.dtype == np.int32
    assert np.abs(codes).max() > 0
    assert found["kinds"].layout_fingerprint == up.fingerprint
    assert found["kinds"].weight == pytest.approx(0.5, abs=2e-6)
    assert found["kinds"].counters["train.examples"].values == [12.0]
    assert found["kinds"].adapter_digest == plans.of().adapter_digest
    Update.zero(up, Grid(3)) + Update(up, Grid(3), codes, found["kinds"].weight)


def test_a_plan_sent_again_is_answered_from_disk_by_a_new_worker(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch) -> None:
    first = make_worker(site).handle(plans.message(plans.of()))
    monkeypatch.setattr(rounds, "train", lambda *_: pytest.fail("trained again"))
    again = make_worker(site).handle(plans.message(plans.of(cohort=2)))
    assert again.arrays == first.arrays
    assert plans.results(again)["kinds"].SerializeToString(deterministic=True) == plans.results(first)["kinds"].SerializeToString(
        deterministic=True
    )
    assert not any((site.state / "checkpoints").iterdir())


def test_the_answer_depends_on_plan_rows_and_seed(site: SiteConfig, make_worker: MakeWorker, plans, tmp_path: Path) -> None:
    worker = make_worker(site)
    first = worker.handle(plans.message(plans.of())).arrays["kinds"]
    assert worker.handle(plans.message(plans.of(seed=8))).arrays["kinds"] != first
    (tmp_path / "kinds.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{n} saws", "label": "tool", "split": "train"}) for n in range(12))
    )
    assert make_worker(site).handle(plans.message(plans.of())).arrays["kinds"] != first


def test_an_interrupted_round_goes_on_from_its_checkpoint_bit_identically(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    undisturbed = make_worker(site).handle(plans.message(plans.of(settings={"steps": 4})))
    other = site.model_copy(update={"state": site.state.parent / "other"})
    steps: list[int] = []

    def interrupt(_task: str, step: int) -> None:
        steps.append(step)
        if steps.count(3) == 1 and step == 3:
            raise KeyboardInterrupt

    worker = make_worker(other)
    worker.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        worker.handle(plans.message(plans.of(settings={"steps": 4})))
    steps.clear()
    steps.append(3)
    resumed = worker.handle(plans.message(plans.of(settings={"steps": 4})))
    assert resumed.arrays == undisturbed.arrays
    assert 1 not in steps
    mine, whole = plans.results(resumed)["kinds"], plans.results(undisturbed)["kinds"]
    assert {k: list(v.values) for k, v in mine.counters.items()} == {k: list(v.values) for k, v in whole.counters.items()}


def test_changed_roles_patch_the_adapter_that_the_site_holds(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, start = make_worker(site), plans.start()
    worker.handle(plans.message(plans.of()))
    moved = start.patch(start.pick({"B", "head"}).scaled(0.5))
    plan = plans.of(number=2, adapter_digest=moved.digest, previous_digest=start.digest, down_roles=["B", "head"])
    message = plans.message(plan, arrays={"kinds": moved.pick({"B", "head"})}, number=2)
    assert plans.results(worker.handle(message))["kinds"].status == OK
    hello = worker.handle(Envelope.of("hello", Hello(federation="f"))).open(Capabilities)
    assert {h.task: h.adapter_digest for h in hello.holdings}["kinds"] == moved.digest
    fresh = make_worker(site.model_copy(update={"state": site.state.parent / "fresh"}))
    missing = plans.results(fresh.handle(message))["kinds"]
    assert missing.status == MISSING
    assert "send it whole" in missing.reason


@pytest.mark.parametrize("codec", [OneBit(), Int4()], ids=lambda codec: codec.kind)
def test_a_step_in_a_codec_makes_the_adapter_that_the_coordinator_holds(site: SiteConfig, make_worker: MakeWorker, plans, codec) -> None:
    worker, start = make_worker(site), plans.start()
    worker.handle(plans.message(plans.of()))
    held = start.pick({"B", "head"})
    message, told, _ = tell(codec, held, held + held.scaled(0.1), Tensors.zeros(held.layout))
    after = start.patch(told)
    said = {"down_codec_json": json.dumps(config.describe(codec)), "down_roles": ["B", "head"], "previous_digest": start.digest}
    array = {"kinds": flat.pack(held.layout.fingerprint, np.frombuffer(message, np.uint8))}

    def ask(digest: str, array: dict[str, bytes], **changes: object) -> TaskResult:
        plan = plans.of(number=2, adapter_digest=digest, **{**said, **changes})
        asked = plans.message(plan, arrays={}, number=2)
        return plans.results(worker.handle(Envelope(asked.kind, asked.body, array)))["kinds"]

    assert "start values have digest" in ask(start.scaled(2.0).digest, array).reason
    assert "do both sides run one version" in ask(after.digest, array, down_codec_json='{"kind": "none"}').reason
    short = {"kinds": flat.pack(held.layout.fingerprint, np.frombuffer(message[:-1], np.uint8))}
    assert ask(after.digest, short).status != OK
    assert ask(after.digest, array).status == OK


def test_a_held_adapter_needs_no_array(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker = make_worker(site)
    worker.handle(plans.message(plans.of()))
    assert plans.results(worker.handle(plans.message(plans.of(seed=9), arrays={})))["kinds"].status == OK


def test_evaluation_answers_sums_for_the_adapter_and_for_the_base(site: SiteConfig, make_worker: MakeWorker, plans, base) -> None:
    worker = make_worker(site)
    width = base.config.hidden_size
    centroid = Centroid(task="kinds", values=np.eye(1, width)[0].tolist())
    plan = plans.of(want_embedding=True, centroids=[centroid])
    reply = worker.handle(plans.message(plan, kind="evaluate"))
    result = plans.results(reply)["kinds"]
    assert result.status == OK, result.reason
    assert not reply.arrays
    counters = {name: list(values.values) for name, values in result.counters.items()}
    assert counters["adapter.examples"] == counters["base.examples"] == [12.0]
    assert len(counters["embedding.sum"]) == width
    assert counters["embedding.count"] == [12.0]
    assert sum(counters["cosine.kinds"]) == 12.0
    assert np.linalg.norm(counters["embedding.sum"]) <= 12.0 + 1e-3
    assert "embedding.moments" not in counters


def test_second_moments_are_of_one_half_of_the_rows_and_closeness_of_the_other(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker = make_worker(site)
    result = plans.results(worker.handle(plans.message(plans.of(want_moments=True, want_ngrams=True), kind="evaluate")))["kinds"]
    found = moments(result.counters["embedding.moments"].values)
    told = spread_message(replace(found, ngrams=np.array(result.counters["text.ngrams"].values)))
    result = plans.results(worker.handle(plans.message(plans.of(own=told, pool=told), kind="evaluate")))["kinds"]
    assert found.count == sum(result.counters["closeness"].values) == sum(result.counters["closeness.text"].values) == 6.0
    told.ngrams = b""
    result = plans.results(worker.handle(plans.message(plans.of(own=told, pool=told), kind="evaluate")))["kinds"]
    assert "closeness.text" not in result.counters
    told.mean = told.mean[:8]
    result = plans.results(worker.handle(plans.message(plans.of(own=told, pool=told), kind="evaluate")))["kinds"]
    assert (result.status, "a mean of 2 values, a covariance of 64" in result.reason) == (FAILED, True)


def test_a_centroid_of_another_base_is_that_tasks_failure(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    plan = plans.of(centroids=[Centroid(task="kinds", values=[1.0, 0.0])])
    result = plans.results(make_worker(site).handle(plans.message(plan, kind="evaluate")))["kinds"]
    assert (result.status, "centroid of task 'kinds': 2 values" in result.reason) == (FAILED, True)


def test_what_left_is_in_the_audit_log(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker = make_worker(site)
    reply = worker.handle(plans.message(plans.of()))
    worker.handle(plans.message(plans.of()))
    first, second = (json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines())
    layout = plans.spec().layout
    assert first["tensors"] == {role: 4 * layout.subset({role}).size for role in ("B", "head")}
    assert sum(first["tensors"].values()) < len(reply.arrays["kinds"]) <= sum(first["tensors"].values()) + 64
    assert (first["outcome"], first["repeated"], second["repeated"]) == ("ok", False, True)
    assert first["digest"] == second["digest"]
    assert "train.loss" in first["counters"]


def test_rows_are_read_and_tokenised_once(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch) -> None:
    worker = make_worker(site)
    worker.handle(plans.message(plans.of()))
    monkeypatch.setattr("fedpeft_client.shelf.read_rows", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("fedpeft.tasks.Classification.encode", lambda *_: pytest.fail("tokenised again"))
    reply = worker.handle(plans.message(plans.of(seed=9)))
    assert plans.results(reply)["kinds"].status == OK
    assert reply.open(RoundReply).base_loads == bases.LOADS
