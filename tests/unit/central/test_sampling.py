"""The pool of several tasks, and which of its examples make up each step."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.bases.spec import HeadSpec
from fedpeft.central import sampling
from fedpeft.central.pool import Pool
from fedpeft.central.sampling import dealt, shares_of, windows
from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks.protocol import Encoded
from fedpeft.training.mixing import Explicit, Proportional


def encoded(lengths, start=1, choices=1):
    ids = tuple(np.arange(length, dtype=np.int32) + 3 for length in lengths for _ in range(choices))
    count = len(lengths)
    return Encoded(ids, np.arange(count) * choices + choices - 1, np.full(len(ids), start), np.repeat(np.arange(count), choices), 0)


def pool_of(sizes, kind="lm", seed=0):
    draw = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(len(sizes))]
    tasks = {name: SimpleNamespace(head=HeadSpec(kind, ("a", "b") if kind != "lm" else ())) for name in names}
    return Pool.of(tasks, {name: encoded(draw.integers(1, 30, size)) for name, size in zip(names, sizes, strict=True)})


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, more=st.integers(0, 12), seed=st.integers(0, 9), ranks=st.integers(1, 4))
def test_every_step_holds_every_task_and_ranks_share_it_exactly(sizes, more, seed, ranks):
    pool = pool_of(sizes)
    size = -(-(len(sizes) + more) // ranks) * ranks
    drawn = list(islice(windows(pool, shares_of(pool, Proportional()), size, seed), 8))
    for picks in drawn:
        assert len(picks) == size
        assert set(pool.owners_of(picks).tolist()) == set(range(len(sizes)))
        parts = dealt(pool, picks, ranks)
        assert sorted(np.concatenate(parts)) == sorted(picks)
        assert {len(part) for part in parts} == {size // ranks}
        assert sum(pool.counts(part) for part in parts).tolist() == pool.counts(picks).tolist()
    again = list(islice(windows(pool, shares_of(pool, Proportional()), size, seed), 5, 8))
    assert all(np.array_equal(one, other) for one, other in zip(drawn[5:], again, strict=True))


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(1.0, 4.0), min_size=2, max_size=4), seed=st.integers(0, 9))
def test_in_the_long_run_shares_are_exact_and_no_example_comes_twice_before_all_came(weights, seed):
    pool = pool_of([7] * len(weights))
    shares = shares_of(pool, Explicit({f"t{i}": weight for i, weight in enumerate(weights)}))
    steps, size = 60, 16
    picks = np.concatenate(list(islice(windows(pool, shares, size, seed), steps)))
    for task, share in enumerate(shares.values()):
        own = picks[pool.owners_of(picks) == task]
        assert abs(len(own) - share * steps * size) <= 2
        seen = np.bincount(own - pool.firsts[task], minlength=7)
        assert seen.max() - seen.min() <= 1 + size // 7  # a step's examples are shuffled


def test_a_share_of_zero_is_refused():
    pool = pool_of([3, 3, 3])
    with pytest.raises(ConfigError, match=r"\['t1'\] have share 0"):
        shares_of(pool, Explicit({"t0": 1.0, "t1": 0.0, "t2": 1.0}))


def test_parts_say_whose_each_token_and_row_is():
    tasks = {"a": SimpleNamespace(head=HeadSpec("lm")), "b": SimpleNamespace(head=HeadSpec("lm"))}
    pool = Pool.of(tasks, {"a": encoded([4, 2], start=2), "b": encoded([3, 5], choices=2)})
    assert pool.terms_of(np.arange(4)).tolist() == [2, 0, 2, 4]
    part = pool.part([3, 0])
    assert part.owners.tolist() == [[1] * 5 + [0] * 4]
    assert part.batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert (part.batch.labels != -100).sum() == pool.counts(np.array([3, 0])).sum() == 6
    rows = pool_of([2, 3], "classification").part([4, 1])
    assert rows.owners.tolist() == [1, 0]
    assert rows.batch.labels.shape == (2,)


def test_tasks_of_different_kinds_and_tasks_without_rows_are_refused():
    tasks = {"a": SimpleNamespace(head=HeadSpec("lm")), "b": SimpleNamespace(head=HeadSpec("classification", ("x", "y")))}
    with pytest.raises(ConfigError, match="need one kind"):
        Pool.of(tasks, {"a": encoded([3]), "b": encoded([3])})
    with pytest.raises(DataError, match=r"\['a'\]: no example"):
        Pool.of({"a": tasks["a"]}, {"a": encoded([])})


@settings(max_examples=20, deadline=None)
@given(count=st.integers(17, 300), block=st.integers(1, 16), seed=st.integers(0, 1 << 30))
def test_many_examples_come_in_an_order_that_is_not_held_in_memory(count, block, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BLOCK", block)
        parts = [part for part in sampling._order(count, np.random.default_rng(seed))]
        again = [part for part in sampling._order(count, np.random.default_rng(seed))]
    assert all(len(part) <= block for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_an_order_of_many_is_as_good_as_a_shuffle(monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 8)
    count, seeds = 100, 2000
    firsts = np.array([next(iter(sampling._order(count, np.random.default_rng([1, seed]))))[:2] for seed in range(seeds)])
    for column in firsts.T:  # chi-square of uniform, 99 degrees of freedom: mean 99, standard deviation 14
        expected = seeds / count
        assert ((np.bincount(column, minlength=count) - expected) ** 2 / expected).sum() < 99 + 5 * 14
    assert abs(np.mean(np.diff(firsts) == 1) - 1 / count) < 0.01
