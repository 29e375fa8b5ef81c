"""The worker: what it answers, from disk and by work, and how one task's fault stays that task's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeft import bases, config
from fedpeft.errors import LinkError, StorageError, UpdateError
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.promise import Whole, dumps
from fedpeft.routing.moments import moments
from fedpeft.tensors import Layout, Tensors
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


def policy(site: SiteConfig, **changes) -> SiteConfig:
    return site.model_copy(update={"policy": site.policy.model_copy(update=changes)})


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
    result = plans.results(worker.handle(plans.message(plans.of(want_moments=True), kind="evaluate")))["kinds"]
    found = moments(result.counters["embedding.moments"].values)
    told = spread_message(found)
    result = plans.results(worker.handle(plans.message(plans.of(own=told, pool=told), kind="evaluate")))["kinds"]
    assert found.count == sum(result.counters["closeness"].values) == 6.0
    told.mean = told.mean[:8]
    result = plans.results(worker.handle(plans.message(plans.of(own=told, pool=told), kind="evaluate")))["kinds"]
    assert (result.status, "a mean of 2 values, a covariance of 384" in result.reason) == (FAILED, True)


def test_an_encoder_beside_the_base_is_used_where_the_policy_allows_it(site: SiteConfig, make_worker: MakeWorker, plans, base) -> None:
    named = f"minilm@{base.fingerprint.identity}"
    both = plans.message(plans.of(want_embedding=True, encoder=f"{named}+{base.encoder}"), kind="evaluate")
    result = plans.results(make_worker(site).handle(both))["kinds"]
    halves = np.split(np.array(result.counters["embedding.sum"].values), 2)
    np.testing.assert_allclose(*halves, atol=0.2)
    refused = plans.results(make_worker(policy(site, encoders=())).handle(both))["kinds"]
    assert "encoders: asked to embed rows with ['minilm'], allowed []" in refused.reason


def test_a_centroid_of_another_base_is_that_tasks_failure(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    plan = plans.of(centroids=[Centroid(task="kinds", values=[1.0, 0.0])])
    result = plans.results(make_worker(site).handle(plans.message(plan, kind="evaluate")))["kinds"]
    assert (result.status, "centroid of task 'kinds': 2 values" in result.reason) == (FAILED, True)


@pytest.mark.parametrize(
    ("limits", "plan", "names"),
    [
        ({"tasks": ("more",)}, {}, ["tasks"]),
        ({"bases": ("another",)}, {}, ["bases"]),
        ({"methods": ("ia3",)}, {}, ["methods"]),
        ({"max_rank": 3}, {}, ["max_rank"]),
        ({"max_upload_mb": 0.001}, {}, ["max_upload_mb"]),
        ({"min_cohort": 4}, {}, ["min_cohort"]),
        ({"require_secure_aggregation": True}, {}, ["require_secure_aggregation"]),
        ({"max_epsilon": 2.0}, {}, ["max_epsilon"]),
        ({"max_epsilon": 2.0}, {"privacy_json": dumps(Whole(8.0, 1e-5, Mechanism(0.5, 1.0, 3)))}, ["max_epsilon"]),
        ({"modules": ("*.value.*",)}, {}, ["modules"]),
        ({"max_steps": 1}, {}, ["max_steps"]),
        ({"max_upload_mb_per_day": 0.001}, {}, ["max_upload_mb_per_day"]),
        ({"max_steps": 1, "min_cohort": 9}, {}, ["max_steps", "min_cohort"]),
    ],
)
def test_each_policy_rule_refuses_by_name(site: SiteConfig, make_worker: MakeWorker, plans, limits, plan, names) -> None:
    reply = make_worker(policy(site, **limits)).handle(plans.message(plans.of(**plan)))
    result = plans.results(reply)["kinds"]
    assert result.status == REFUSED
    for name in names:
        assert f"{name}: asked" in result.reason
    assert not reply.arrays
    assert "refused" in (site.state / "audit.jsonl").read_text()


def test_a_policy_that_names_this_base_accepts(site: SiteConfig, make_worker: MakeWorker, plans, base) -> None:
    for name in ("minilm", base.fingerprint.identity):
        plan = plans.of(privacy_json=dumps(Whole(4.0, 1e-5, Mechanism(2.0, 1.0, 3))))
        result = plans.results(make_worker(policy(site, bases=(name,), max_epsilon=4.0)).handle(plans.message(plan)))
        assert result["kinds"].status == OK


def changed_spec(plans, **changes) -> str:
    return json.dumps({**plans.spec().to_json(), **changes})


def test_a_wrong_base_is_refused_with_both_identities(site: SiteConfig, make_worker: MakeWorker, plans, base) -> None:
    plan = plans.of(spec_json=changed_spec(plans, base="f" * 64))
    result = plans.results(make_worker(site).handle(plans.message(plan)))["kinds"]
    assert result.status == REFUSED
    assert "f" * 64 in result.reason
    assert base.fingerprint.identity in result.reason


def test_a_plan_that_lies_about_its_layout_fails_by_name(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    rows = plans.spec().layout.to_json()
    rows[0]["shape"] = [3, *rows[0]["shape"][1:]]
    lie = Tensors.zeros(Layout.from_json(rows))
    plan = plans.of(spec_json=changed_spec(plans, layout=rows), adapter_digest=lie.digest)
    result = plans.results(make_worker(site).handle(plans.message(plan, arrays={"kinds": lie})))["kinds"]
    assert result.status == FAILED
    assert "AdapterError" in result.reason
    assert "another base or version" in result.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_digest": "0" * 64}, "the plan promises 000000000000"),
        ({"adapter_digest": "../../etc/passwd"}, "not a SHA-256"),
        ({"task_json": "{"}, "cannot be read"),
        ({"task_json": '{"kind": "poetry"}'}, "unknown kind 'poetry'"),
        ({"settings_json": '{"steps": 0}'}, "settings"),
        ({"scheme_json": '"gossip"'}, "unknown kind 'gossip'"),
        ({"task_json": '{"kind": "classification", "name": "kinds", "labels": ["a", "b", "c"]}'}, "a plan speaks of one task"),
        ({"roles": ["A"]}, "trains ['B', 'head'] there"),
        ({"grid_sites": 0}, "sites must be at least 1"),
        ({"grid_reach": 1e-9}, "the plan allows"),
    ],
)
def test_a_plan_that_lies_otherwise_fails_by_name(site: SiteConfig, make_worker: MakeWorker, plans, changes, words) -> None:
    found = plans.results(make_worker(site).handle(plans.message(plans.of(**changes))))
    assert found["kinds"].status == FAILED
    assert words in found["kinds"].reason
    assert "\n" not in found["kinds"].reason


def test_start_values_that_are_not_finite_are_refused(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    start = plans.start()
    broken = Tensors(start.layout, np.full_like(start.flat, np.nan))
    result = plans.results(make_worker(site).handle(plans.message(plans.of(adapter_digest=broken.digest), arrays={"kinds": broken})))[
        "kinds"
    ]
    assert (result.status, "not finite" in result.reason) == (FAILED, True)


def test_a_damaged_array_is_that_tasks_failure(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    message = plans.message(plans.of(), plans.of("more"))
    damaged = message.arrays["kinds"][:-1] + b"\xff"
    found = plans.results(make_worker(site).handle(dataclasses.replace(message, arrays={**message.arrays, "kinds": damaged})))
    assert (found["kinds"].status, found["more"].status) == (FAILED, OK)
    assert "checksum" in found["kinds"].reason


def test_training_that_diverges_is_a_named_failure(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    plan = plans.of(settings={"lr": 1e30, "steps": 4})
    reply = make_worker(site).handle(plans.message(plan, plans.of("more")))
    found = plans.results(reply)
    assert found["kinds"].status == FAILED
    assert found["kinds"].reason.startswith("UpdateError")
    assert found["more"].status == OK
    assert set(reply.arrays) == {"more"}


def test_a_bad_row_is_a_named_failure_that_quotes_nothing(site: SiteConfig, make_worker: MakeWorker, plans, tmp_path: Path) -> None:
    (tmp_path / "kinds.jsonl").write_text(json.dumps({"text": "top secret words", "label": "secretlabel", "split": "train"}))
    result = plans.results(make_worker(site).handle(plans.message(plans.of())))["kinds"]
    assert result.status == FAILED
    assert result.reason.startswith("DataError")
    assert "secret" not in result.reason


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (MemoryError(), "OutOfMemory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "OutOfMemory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("row: my secret"), "a defect of fedpeft"),
    ],
)
def test_any_other_fault_is_a_named_failure(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch, fault, words) -> None:
    def fail(*_):
        raise fault

    monkeypatch.setattr(rounds, "train", fail)
    result = plans.results(make_worker(site).handle(plans.message(plans.of())))["kinds"]
    assert result.status == FAILED
    assert words in result.reason
    assert "secret" not in result.reason


def test_an_answer_that_cannot_be_kept_does_not_leave(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch) -> None:
    worker = make_worker(site)

    def full(*_):
        raise StorageError("answers: no space")

    monkeypatch.setattr(type(worker.answers), "put", full)
    reply = worker.handle(plans.message(plans.of()))
    assert plans.results(reply)["kinds"].status == FAILED
    assert not reply.arrays


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


def test_other_messages_are_refused(site: SiteConfig, make_worker: MakeWorker) -> None:
    worker = make_worker(site)
    with pytest.raises(LinkError, match="answers 'hello', 'train', 'evaluate', 'secure'"):
        worker.handle(Envelope("reply", b""))
    with pytest.raises(UpdateError, match="malformed"):
        worker.handle(Envelope("train", b"\xff\xff"))


def test_rows_are_read_and_tokenised_once(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch) -> None:
    worker = make_worker(site)
    worker.handle(plans.message(plans.of()))
    monkeypatch.setattr("fedpeft_client.shelf.read_rows", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("fedpeft.tasks.Classification.encode", lambda *_: pytest.fail("tokenised again"))
    reply = worker.handle(plans.message(plans.of(seed=9)))
    assert plans.results(reply)["kinds"].status == OK
    assert reply.open(RoundReply).base_loads == bases.LOADS
