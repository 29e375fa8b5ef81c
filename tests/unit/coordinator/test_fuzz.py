"""Answers from hostile sites: each counts, or is a named drop-out; the sum of the others stays as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.tensors import Tensors
from fedpeft.update import COUNTER_LIMIT, Update
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1.federation_pb2 import RoundReply, TaskResult, Values
from fedpeft_coordinator import collecting, planning
from fedpeft_coordinator.collecting import Tally
from fedpeft_coordinator.transport import Answer
from fedpeft_coordinator.updates import Updates

NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, 5e-324, 2.0**-20, 0.5, 1.0, 1 + 2.0**-20, 2.0, COUNTER_LIMIT, 1e300]))


@pytest.fixture(scope="module")
def around(fake):
    """A setup, its first plan, and the layout that travels."""
    setup = fake.setup(tasks=("area",))
    known = planning.Known([], fake_sites(), lambda task, _digest: task.start() if hasattr(task, "start") else fake.start(task.name))
    plan = planning.plan_round(setup, 1, 0, known)
    return setup, plan


def fake_sites():
    from fedpeft_coordinator.state import Site

    return [Site(name, {"area": 10}) for name in ("north", "south", "west")]


def answer(around, result: TaskResult, body: bytes | None = None, array: bytes | None = None, **reply: object) -> tuple[Answer, object]:
    message = RoundReply(**{"site": "north", "round": 1, "results": [result], **reply})
    arrays = {} if array is None else {"area": array}
    return Answer("north", Envelope("reply", message.SerializeToString() if body is None else body, arrays), 0.1)


def good(updates: Updates) -> tuple[TaskResult, bytes]:
    one = updates.tasks["area"]
    update = Update.encode(Tensors(one.layout, np.full(one.layout.size, 0.25, np.float32)), 0.5, {"n": (1.0,)}, one.grid)
    result = TaskResult(
        task="area", status=TaskResult.STATUS_OK, weight=update.weight, layout_fingerprint=one.layout.fingerprint,
        counters={"n": Values(values=[1.0])}, adapter_digest="x",
    )  # fmt: skip
    return result, flat.pack(one.layout.fingerprint, update.codes)


def judged(around, answered: Answer) -> tuple[str, Updates]:
    setup, plan = around
    updates = Updates(plan, setup)
    report = collecting.read(answered, plan, ["area"], updates.accept)
    json.dumps(dict(report.outcomes))
    assert all(len(why) < 400 and why.isprintable() for why in report.outcomes.values())
    return report.outcomes["area"], updates


def test_the_specimen_itself_counts(around):
    result, array = good(Updates(around[1], around[0]))
    assert judged(around, answer(around, result, array=array))[0] == "ok"


@given(data=st.data())
def test_spoilt_replies_are_named_drop_outs(around, data, spoilt):
    result, array = good(Updates(around[1], around[0]))
    whole = RoundReply(site="north", round=1, results=[result]).SerializeToString()
    outcome, updates = judged(around, answer(around, result, data.draw(spoilt(whole)), array))
    assert outcome == "ok" or not updates.tasks["area"].total.count


@given(data=st.data())
def test_spoilt_arrays_are_named_drop_outs(around, data, spoilt):
    result, array = good(Updates(around[1], around[0]))
    body = data.draw(spoilt(array))
    outcome, updates = judged(around, answer(around, result, array=body))
    assert (outcome == "ok") == (body == array)
    assert updates.tasks["area"].total.count == (body == array)


@given(weight=NUMBERS, codes=st.integers(-(2**31), 2**31 - 1), counter=NUMBERS, seconds=NUMBERS)
def test_any_numbers_are_in_range_or_a_drop_out(around, weight, codes, counter, seconds):
    result, _ = good(Updates(around[1], around[0]))
    one = Updates(around[1], around[0]).tasks["area"]
    result.weight, result.train_seconds = weight, seconds
    result.counters["n"].values[:] = [counter]
    array = flat.pack(one.layout.fingerprint, np.full(one.layout.size, codes, np.int32))
    outcome, updates = judged(around, answer(around, result, array=array))
    total = updates.tasks["area"].total
    if outcome == "ok":
        assert 0 < total.weight <= 1
        assert np.abs(total.codes.astype(np.int64)).max() <= one.grid.limit
        assert total.mean().finite
    else:
        assert total.count == 0


@given(values=st.lists(NUMBERS, max_size=4), name=st.text(max_size=8), times=st.integers(1, 300))
def test_any_counters_of_an_evaluation(around, values, name, times):
    tally = Tally()
    result = TaskResult(task="area", status=TaskResult.STATUS_OK)
    for number in range(times):
        result.counters[f"{name}{number}"].values.extend(values)
    report = collecting.read(answer(around, result), around[1], ["area"], tally.accept)
    assert report.outcomes["area"] == "ok" or not tally.counters


@given(site=st.text(max_size=6), number=st.integers(0, 9), kind=st.sampled_from(["reply", "train", "hello"]))
def test_answers_of_others_or_other_rounds_do_not_count(around, site, number, kind):
    result, array = good(Updates(around[1], around[0]))
    message = RoundReply(site=site, round=number, results=[result])
    outcome, _ = judged(around, Answer("north", Envelope(kind, message.SerializeToString(), {"area": array}), 0.1))
    assert (outcome == "ok") == (site == "north" and number == 1 and kind == "reply")
