"""What a site keeps for itself: private tensors and controls survive any kill, are used everywhere, and never leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fedpeft.schemes import SCHEMES
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.wire import Envelope, flat
from fedpeft.wire.envelope import control_key
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_client.config import SiteConfig
from fedpeft_client.personal import Own, Personal
from fedpeft_client.store import Store
from fedpeft_client.worker import Worker

MakeWorker = Callable[[SiteConfig], Worker]
OK, FAILED, REFUSED = TaskResult.STATUS_OK, TaskResult.STATUS_FAILED, TaskResult.STATUS_REFUSED
RUN = ("f", "r")
PRIVATE = {"scheme": {"kind": "fedsa", "share": "A"}}
SHARED, KEPT = {"A"}, {"B", "head"}


def result_of(plans, reply: Envelope) -> TaskResult:
    result = plans.results(reply)["kinds"]
    assert result.status == OK, result.reason
    return result


def moved(plans, reply: Envelope) -> Tensors:
    """The global adapter after the shared factor moved by one site's whole answer."""
    start = plans.start()
    part = start.layout.subset(SHARED)
    codes = reply.array("kinds", part.fingerprint)
    return start.patch(Tensors(part, start.pick(SHARED).flat + codes.astype(np.float32) * np.float32(2.0**-27)))


def second(plans, after: Tensors, **changes) -> Envelope:
    plan = plans.of(number=2, adapter_digest=after.digest, seed=8, **PRIVATE, **changes)
    return plans.message(plan, arrays={"kinds": after}, number=2)


def own_values(worker: Worker, number: int) -> dict[str, np.ndarray]:
    return dict(worker.personal.at(RUN, "kinds", number).values)


def test_private_roles_stay_are_kept_and_are_trained_on(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, start = make_worker(site), plans.start()
    first = worker.handle(plans.message(plans.of(**PRIVATE)))
    assert result_of(plans, first).layout_fingerprint == start.layout.subset(SHARED).fingerprint
    kept = own_values(worker, 1)
    assert set(kept) == {f"private/{role}" for role in KEPT}
    assert not np.array_equal(kept["private/head"], start.pick({"head"}).flat)
    after = moved(plans, first)
    mine = result_of(plans, make_worker(site).handle(second(plans, after)))
    fresh = result_of(plans, make_worker(site.model_copy(update={"state": site.state.parent / "new"})).handle(second(plans, after)))
    assert mine.counters["train.loss"].values[0] != fresh.counters["train.loss"].values[0]
    assert not np.array_equal(own_values(worker, 2)["private/B"], kept["private/B"])


def test_the_site_scores_with_its_own_tensors(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker = make_worker(site)
    after = moved(plans, worker.handle(plans.message(plans.of(settings={"lr": 0.05}, **PRIVATE))))
    scored = plans.of(adapter_digest=after.digest, counted_round=1, **PRIVATE)
    message = plans.message(scored, kind="evaluate", arrays={"kinds": after})
    fresh = make_worker(site.model_copy(update={"state": site.state.parent / "new"}))
    mine, common = (result_of(plans, one.handle(message)).counters for one in (worker, fresh))
    assert mine["adapter.examples"].values == common["adapter.examples"].values
    assert any(list(mine[name].values) != list(common[name].values) for name in mine if name.startswith("adapter."))


def test_nothing_private_is_on_the_wire(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, start = make_worker(site), plans.start()
    first = worker.handle(plans.message(plans.of(**PRIVATE)))
    after = moved(plans, first)
    replies = [first, worker.handle(second(plans, after))]
    scored = plans.of(adapter_digest=after.digest, counted_round=2, **PRIVATE)
    replies.append(worker.handle(plans.message(scored, kind="evaluate", arrays={"kinds": after})))
    wire = b"".join(reply.body + b"".join(reply.arrays.values()) for reply in replies)
    weight = result_of(plans, first).weight
    for number in (1, 2):
        for name, values in own_values(worker, number).items():
            begin = start.pick({name.removeprefix("private/")}).flat
            delta = np.rint((values - begin).astype(np.float64) * weight * 2.0**27).astype(np.int32)
            for bits in (*windows(values), *windows(delta)):
                assert bits not in wire
    shared = np.frombuffer(first.arrays["kinds"], np.uint8)
    assert any(bits in wire for bits in windows(flat.unpack(shared.tobytes())[1]))


def windows(values: np.ndarray) -> Iterator[bytes]:
    """Runs of four values that are not all zero, from all over ``values``."""
    for place in range(0, values.size - 4, max(values.size // 50, 1)):
        if np.count_nonzero(values[place : place + 4]) == 4:
            yield np.ascontiguousarray(values[place : place + 4]).tobytes()


def test_a_scheme_that_would_send_private_roles_is_stopped(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch) -> None:
    plan = plans.of(**PRIVATE)
    monkeypatch.setattr(SCHEMES["fedsa"], "travels", lambda _self, layout, _phase: layout)
    reply = make_worker(site).handle(plans.message(plan))
    result = plans.results(reply)["kinds"]
    assert (result.status, reply.arrays) == (FAILED, {})
    assert "sends the private roles ['B', 'head']" in result.reason


def test_a_promise_of_secure_aggregation_that_cannot_hold_is_refused(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    result = plans.results(make_worker(site).handle(plans.message(plans.of(scheme="flexlora", secure_aggregation=True))))["kinds"]
    assert (result.status, "scheme flexlora needs every site's part" in result.reason) == (FAILED, True)


class Killed(BaseException):
    """Stands for kill -9."""


class Fatal(Store):
    """A store whose writer dies."""

    def put(self, key: str, blob: bytes) -> None:
        raise Killed


def in_training(worker: Worker) -> None:
    def heard(_task: str, step: int) -> None:
        if step == 1:
            raise Killed

    worker.progress = heard


def before_it_is_kept(worker: Worker) -> None:
    worker.personal = Personal(Fatal(worker.personal.store.root, worker.keep))


def before_it_is_answered(worker: Worker) -> None:
    worker.answers = Fatal(worker.answers.root, worker.keep)


CUTS = {cut.__name__: cut for cut in (in_training, before_it_is_kept, before_it_is_answered)}


@pytest.mark.parametrize("where", CUTS)
def test_a_killed_worker_answers_the_same_and_keeps_the_same(site: SiteConfig, make_worker: MakeWorker, plans, where: str) -> None:
    whole = make_worker(site.model_copy(update={"state": site.state.parent / "whole"}))
    first = whole.handle(plans.message(plans.of(**PRIVATE)))
    after = moved(plans, first)
    then = whole.handle(second(plans, after))

    for message, expected in ((plans.message(plans.of(**PRIVATE)), first), (second(plans, after), then)):
        broken = make_worker(site)
        CUTS[where](broken)
        with pytest.raises(Killed):
            broken.handle(message)
        assert make_worker(site).handle(message).arrays == expected.arrays
        assert make_worker(site).handle(message).arrays == expected.arrays
    mine, theirs = own_values(make_worker(site), 2), own_values(whole, 2)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_a_round_that_is_planned_again_starts_from_before_it(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    """Too few sites answered: the same round comes with another cap, and must not train on what the failed attempt left."""
    once, twice = make_worker(site), make_worker(site.model_copy(update={"state": site.state.parent / "twice"}))
    twice.handle(plans.message(plans.of(**PRIVATE)))
    again = plans.message(plans.of(weight_cap=48, **PRIVATE))
    assert twice.handle(again).arrays == once.handle(again).arrays


def test_an_answer_that_did_not_count_leaves_no_trace(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    """Round 1 counted, round 2 did not (late, say): round 3 goes on from round 1, as at a site that was never asked in round 2."""
    asked, spared = make_worker(site), make_worker(site.model_copy(update={"state": site.state.parent / "spared"}))
    after = moved(plans, asked.handle(plans.message(plans.of(**PRIVATE))))
    spared.handle(plans.message(plans.of(**PRIVATE)))
    asked.handle(second(plans, after))
    third = plans.of(number=3, counted_round=1, adapter_digest=after.digest, **PRIVATE)
    message = plans.message(third, arrays={"kinds": after}, number=3)
    assert asked.handle(message).arrays == spared.handle(message).arrays
    assert plans.results(asked.handle(message))["kinds"].status == OK


def test_another_run_starts_anew(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker = make_worker(site)
    worker.handle(plans.message(plans.of(**PRIVATE)))
    assert worker.personal.at(("f", "another"), "kinds", 5) == Own()
    assert worker.personal.at(RUN, "more", 5) == Own()


CONTROLLED = {"scheme": {"kind": "scaffold"}, "settings": {"optimizer": "sgd", "lr": 0.05, "clip": 0.0}}


def controlled(plans, control: Tensors, **changes) -> Envelope:
    fields = {"control_digest": control.digest, **CONTROLLED, **changes}
    message = plans.message(plans.of(**fields))
    return Envelope(
        message.kind, message.body, {**message.arrays, control_key("kinds"): flat.pack(control.layout.fingerprint, control.flat)}
    )


def test_scaffold_keeps_its_control_and_steps_along_the_difference(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, layout = make_worker(site), plans.spec().layout
    zero = Tensors.zeros(layout)
    reply = worker.handle(controlled(plans, zero))
    up = SCHEMES["scaffold"]().travels(layout, SCHEMES["scaffold"]().phase(1, layout))
    assert result_of(plans, reply).layout_fingerprint == up.fingerprint
    kept = own_values(worker, 1)
    assert set(kept) == {f"control/{role}" for role in layout.roles}
    sent = Tensors(up, reply.array("kinds", up.fingerprint).astype(np.float32) * np.float32(2.0**-27))
    weight = result_of(plans, reply).weight
    gradient = np.concatenate([kept[f"control/{role}"] for role in sorted(layout.roles)])
    np.testing.assert_allclose(sent.pick({"control"}).flat / weight, gradient, atol=1e-6)
    delta = sent.pick(layout.roles).flat / weight
    # Two plain SGD steps without correction (c = c_i = 0); B's rate is that of the method's scale.
    for role, span in layout.role_spans.items():
        scale = plans.spec().method.lr_scale(role)
        np.testing.assert_allclose(delta[span], -2 * 0.05 * scale * gradient[span], atol=1e-6)
    assert worker.handle(controlled(plans, zero)).arrays == reply.arrays


def test_a_control_changes_the_answer_and_a_wrong_one_is_refused(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    worker, layout = make_worker(site), plans.spec().layout
    zero, ones = Tensors.zeros(layout), Tensors(layout, np.full(layout.size, 1e-3, np.float32))
    first = worker.handle(controlled(plans, zero))
    assert worker.handle(controlled(plans, ones)).arrays != first.arrays
    result = plans.results(make_worker(site).handle(controlled(plans, ones, control_digest=zero.digest, seed=99)))["kinds"]
    assert (result.status, "the control is not the promised" in result.reason) == (FAILED, True)
    missing = plans.results(make_worker(site).handle(plans.message(plans.of(**CONTROLLED, seed=98))))["kinds"]
    assert (missing.status, "no array for task 'kinds#control'" in missing.reason) == (FAILED, True)


def limited(site: SiteConfig, rank: int) -> SiteConfig:
    return site.model_copy(update={"policy": site.policy.model_copy(update={"max_rank": rank})})


def test_a_small_site_trains_its_slots_where_the_scheme_can(site: SiteConfig, make_worker: MakeWorker, plans) -> None:
    scheme = {"kind": "slots", "pick": "prefix", "factors": "both", "probes": 0}
    worker, layout = make_worker(limited(site, 2)), plans.spec().layout
    reply = worker.handle(plans.message(plans.of(scheme=scheme)))
    result_of(plans, reply)
    built = SCHEMES["slots"](pick="prefix", factors="both", probes=0)
    up = built.travels(layout, built.phase(1, layout))
    named = Tensors(up, reply.array("kinds", up.fingerprint).astype(np.float32)).named()
    for entry in layout.entries:
        if entry.role == "B":
            assert not named[entry.name][:, 2:].any()
            assert named[entry.name][:, :2].any()
    refused = plans.results(make_worker(limited(site, 2)).handle(plans.message(plans.of())))["kinds"]
    assert (refused.status, "max_rank: asked 4, allowed at most 2" in refused.reason) == (REFUSED, True)


def test_a_scheme_whose_mask_ignores_the_rank_is_refused(site: SiteConfig, make_worker: MakeWorker, plans, monkeypatch) -> None:
    monkeypatch.setattr(SCHEMES["slots"], "mask", lambda *_: None)
    result = plans.results(make_worker(limited(site, 2)).handle(plans.message(plans.of(scheme="slots"))))["kinds"]
    assert (result.status, "scheme slots trains more than rank 2" in result.reason) == (REFUSED, True)


LAYOUT = Layout.of([Entry("A", "a", (3,)), Entry("B", "b", (2,))])


def own(value: float) -> Own:
    return Own().after(Tensors(LAYOUT.subset({"B"}), np.full(2, value, np.float32)), None)


def test_personal_keeps_two_rounds_and_answers_for_any(tmp_path) -> None:
    personal = Personal(Store(tmp_path, 4))
    for since, number in ((0, 1), (1, 2), (2, 5)):
        personal.keep(RUN, "t", (since, number), own(number))
    assert [personal.at(RUN, "t", number).digest for number in (1, 2, 4, 5, 9)] == [
        Own().digest, own(2).digest, own(2).digest, own(5).digest, own(5).digest,
    ]  # fmt: skip
    personal.keep(RUN, "t", (2, 6), own(7))  # round 5 did not count
    assert personal.at(RUN, "t", 6).digest == own(7).digest
    assert personal.at(RUN, "t", 5).digest == own(2).digest
    personal.keep(RUN, "t", (2, 3), own(3))
    assert personal.at(RUN, "t", 9).digest == own(3).digest


def test_private_roles_that_the_phase_moves_for_all_are_not_patched() -> None:
    from fedpeft.schemes import Phase

    start = Tensors.zeros(LAYOUT)
    assert own(4).patch(start, Phase("x", frozenset("A"))).flat.tolist() == [0, 0, 0, 4, 4]
    assert own(4).patch(start, Phase("x", frozenset("AB"))).flat.tolist() == [0, 0, 0, 0, 0]
