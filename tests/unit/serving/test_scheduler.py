"""Continuous batching never changes an answer, is bounded and fair, and frees what is left; against a readable model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.serving import End, Failed, Limits, OverloadedError

FIXTURES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
MIXTURES = st.sampled_from([{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.25, "b": 0.75}])
ASKED = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, 16), min_size=1, max_size=9),
        "mixture": MIXTURES,
        "max_tokens": st.integers(1, 7),
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "seed": st.integers(0, 3),
        "stop": st.sampled_from([(), ("b",), ("cd", "e")]),
        "frequency_penalty": st.sampled_from([0.0, 1.5]),
        "top_logprobs": st.sampled_from([None, 2]),
    }
)
LIMITS = st.builds(Limits, rows=st.integers(1, 4), queue=st.just(100), bite=st.integers(1, 12), alike=st.booleans())


@FIXTURES
@given(asked=st.lists(st.tuples(ASKED, st.integers(0, 6)), min_size=1, max_size=7), limits=LIMITS, whole=st.booleans())
def test_every_request_is_answered_as_if_alone(oracle, ask, alone, asked, limits, whole):
    scheduler, rows = oracle(limits=limits, whole=whole)
    requests = [ask(**settings) for settings, _ in asked]
    arrivals = sorted(range(len(asked)), key=lambda place: asked[place][1])
    clock = 0
    while arrivals or not scheduler.idle:
        while arrivals and asked[arrivals[0]][1] <= clock:
            scheduler.submit(requests[arrivals.pop(0)])
        scheduler.step()
        assert len(rows.seats) == len(scheduler.running) <= limits.rows
        clock += 1
    for request in requests:
        assert request.sink.events == alone(request).events
    assert rows.seats == {}
    bites = [[count for _, count in work if count > 1] for work in rows.forwards]
    assert all(sum(bite) <= limits.bite or (whole and len(bite) == 1) for bite in bites)
    if whole:
        first = {seat: count for work in reversed(rows.forwards) for seat, count in work}
        assert sorted(first.values()) == sorted(len(request.prompt) for request in requests)


@FIXTURES
@given(asked=st.lists(st.tuples(ASKED, st.integers(0, 9)), min_size=2, max_size=6), limits=LIMITS)
def test_who_leaves_frees_its_place_and_changes_nobody_elses_answer(oracle, ask, alone, asked, limits):
    scheduler, rows = oracle(limits=limits)
    requests = [ask(**settings) for settings, _ in asked]
    for request in requests:
        scheduler.submit(request)
    clock = 0
    while not scheduler.idle:
        for request, (_, leaves) in zip(requests, asked, strict=True):
            if leaves == clock and request is not requests[0]:
                request.cancel()
        scheduler.step()
        clock += 1
    assert requests[0].sink.events == alone(requests[0]).events
    for request in requests[1:]:
        last = request.sink.events[-1]
        assert isinstance(last, End)
        whole = alone(request)
        if last.reason == "cancelled":
            assert request.sink.events[:-1] == whole.events[: len(request.sink.events) - 1]
        else:
            assert request.sink.events == whole.events
    assert rows.seats == {}
    assert scheduler.counts.finished + scheduler.counts.cancelled == len(requests)


def test_a_long_prompt_does_not_hold_up_a_running_row(oracle, ask):
    scheduler, _ = oracle(limits=Limits(rows=2, bite=2))
    short, long = ask([3], endless=True, max_tokens=30), ask([1] * 40, endless=True, max_tokens=1)
    scheduler.submit(short)
    scheduler.step()
    scheduler.submit(long)
    for step in range(2, 12):
        scheduler.step()
        assert len(short.sink.tokens) == step
    assert long.sink.tokens == []


def test_a_later_request_joins_and_ends_while_an_earlier_one_still_runs(oracle, ask):
    scheduler, _ = oracle()
    long, short = ask([3], endless=True, max_tokens=20), ask([4], endless=True, max_tokens=2)
    scheduler.submit(long)
    for _ in range(5):
        scheduler.step()
    scheduler.submit(short)
    for _ in range(2):
        scheduler.step()
    assert short.sink.done
    assert not long.sink.done


def test_what_is_too_much_is_refused_and_nothing_else_suffers(oracle, ask, alone):
    scheduler, _ = oracle(limits=Limits(rows=1, queue=2))
    kept = [ask([place], max_tokens=3) for place in (1, 2, 3)]
    for request in kept:
        scheduler.submit(request)
    with pytest.raises(OverloadedError, match="3 requests run or wait") as refused:
        scheduler.submit(ask([4]))
    assert refused.value.retry_after >= 1
    while not scheduler.idle:
        scheduler.step()
    assert [request.sink.events for request in kept] == [alone(request).events for request in kept]


def test_first_come_first_served(oracle, ask):
    scheduler, _ = oracle(limits=Limits(rows=1, queue=9))
    requests = [ask([place], max_tokens=2) for place in (5, 6, 7)]
    for request in requests:
        scheduler.submit(request)
    order = []
    while not scheduler.idle:
        scheduler.step()
        order += [place for place, request in enumerate(requests) if request.sink.done and place not in order]
    assert order == [0, 1, 2]


@FIXTURES
@given(owners=st.lists(st.integers(0, 3), min_size=1, max_size=14), rows=st.integers(1, 4))
def test_a_free_place_goes_to_the_owner_who_has_the_fewest(oracle, ask, owners, rows):
    scheduler, _ = oracle(limits=Limits(rows=rows, queue=99))
    requests = [ask([place], owner=owner, endless=True, max_tokens=2 + place % 3) for place, owner in enumerate(owners, 1)]
    for request in requests:
        scheduler.submit(request)
    while not scheduler.idle:
        empty = not scheduler.running
        scheduler.step()
        running, waiting = [row.request.owner for row in scheduler.running], {request.owner for request in scheduler.waiting}
        assert not empty or all(running.count(owner) >= running.count(other) - 1 for owner in waiting for other in running)
    assert all(request.sink.done for request in requests)


def test_many_of_one_do_not_hold_up_one_of_another(oracle, ask):
    scheduler, _ = oracle(limits=Limits(rows=2, queue=99))
    many = [ask([3], owner="a", endless=True, max_tokens=2) for _ in range(20)]
    few = ask([4], owner="b", endless=True, max_tokens=2)
    for request in [*many, few]:
        scheduler.submit(request)
    for _ in range(4):
        scheduler.step()
    assert few.sink.done
    assert sum(request.sink.done for request in many) == 3


def test_a_failed_step_ends_its_requests_and_keeps_those_that_wait(oracle, ask, alone):
    scheduler, rows = oracle(limits=Limits(rows=1, queue=2))
    first, second = ask([1], endless=True), ask([2])
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    scheduler.fail("the model failed")
    assert isinstance(first.sink.events[-1], Failed)
    assert rows.seats == {}
    while not scheduler.idle:
        scheduler.step()
    assert second.sink.events == alone(second).events
