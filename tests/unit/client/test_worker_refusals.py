"""What a worker refuses by name: policy, lies of the plan, damaged arrays, bad rows, and faults of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import LinkError, StorageError, UpdateError
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.promise import Whole, dumps
from fedpeft.tensors import Layout, Tensors
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_client import join, rounds
from fedpeft_client.config import SiteConfig
from fedpeft_client.status import MESSAGE, Pulse
from fedpeft_client.worker import Worker

OK, REFUSED, FAILED = TaskResult.STATUS_OK, TaskResult.STATUS_REFUSED, TaskResult.STATUS_FAILED
MakeWorker = Callable[[SiteConfig], Worker]


def policy(site: SiteConfig, **changes) -> SiteConfig:
    return site.model_copy(update={"policy": site.policy.model_copy(update=changes)})


def test_an_encoder_beside_the_base_is_used_where_the_policy_allows_it(site: SiteConfig, make_worker: MakeWorker, plans, base) -> None:
    named = f"minilm@{base.fingerprint.identity}"
    both = plans.message(plans.of(want_embedding=True, encoder=f"{named}+{base.encoder}"), kind="evaluate")
    result = plans.results(make_worker(site).handle(both))["kinds"]
    halves = np.split(np.array(result.counters["embedding.sum"].values), 2)
    np.testing.assert_allclose(*halves, atol=0.2)
    refused = plans.results(make_worker(policy(site, encoders=())).handle(both))["kinds"]
    assert "encoders: asked to embed rows with ['minilm'], allowed []" in refused.reason


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


def test_a_plan_that_comes_too_early_is_put_off(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    reply = make_worker(policy(site, max_upload_mb_per_day=0.001)).handle(plans.message(plans.of()))
    result = plans.results(reply)["kinds"]
    assert (result.status, 0 < result.rests <= 86_400) == (TaskResult.STATUS_RESTING, True)
    assert "max_upload_mb_per_day: asked" in result.reason
    assert not reply.arrays


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
    worker = make_worker(site)
    result = plans.results(worker.handle(plans.message(plans.of())))["kinds"]
    assert result.status == FAILED
    assert result.reason.startswith("DataError")
    assert "secret" not in result.reason
    assert "secretlabel" in worker.faults["kinds"], "whoever runs the site is told which row"


def test_what_hinders_a_site_is_on_its_screen_until_it_is_over(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, pulse = make_worker(policy(site, max_steps=1)), Pulse(site.state / "worker.json")
    worker.handle(plans.message(plans.of(), plans.of("more", settings={"steps": 1})))
    pulse.progress(MESSAGE, 0)
    assert join.line(site, [], steps=False).endswith(": waiting for the coordinator"), "a message alone is no news for a log"
    pulse.idle(1, 1, worker.faults)
    said = join.line(site, [], "nobody listens")
    assert "waiting for the coordinator; answered 1, base loaded 1 time; NOT ANSWERED: task kinds: policy of site-a refuses" in said
    assert said.endswith("; NOT REACHED: nobody listens")
    assert said.count("NOT ANSWERED") == 1
    worker.site = site
    worker.handle(plans.message(plans.of()))
    assert worker.faults == {}


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


def test_other_messages_are_refused(site: SiteConfig, make_worker: MakeWorker) -> None:
    worker = make_worker(site)
    with pytest.raises(LinkError, match="answers 'hello', 'train', 'evaluate', 'secure'"):
        worker.handle(Envelope("reply", b""))
    with pytest.raises(UpdateError, match="malformed"):
        worker.handle(Envelope("train", b"\xff\xff"))
