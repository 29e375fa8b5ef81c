"""The streaming sum: the same bits in any order, never wraps, refuses without a trace, holds nothing."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import Sum
from fedpeft.tensors import Entry, Layout
from fedpeft.update import BLOCK, Grid, Update

SMALL = Layout.of([Entry("A", "q.lora_A.weight", (2, 3)), Entry("B", "q.lora_B.weight", (3, 2))])
LARGE = Layout.of([Entry("A", "q.lora_A.weight", (2, BLOCK)), Entry("B", "q.lora_B.weight", (7, 11))])
GRID = Grid(8)


def update(layout, seed, /, grid=GRID, **changes):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-grid.limit, grid.limit, layout.size, np.int32, endpoint=True)
    weight = float(rng.integers(1, 2**20, endpoint=True)) * 2.0**-20
    return replace(Update(layout, grid, codes, weight, {"loss": (float(rng.integers(0, 999)) / 1024,)}), **changes)


def same(left, right):
    assert np.array_equal(left.codes, right.codes)
    assert (left.weight, left.count, dict(left.counters)) == (right.weight, right.count, dict(right.counters))


@settings(max_examples=60)
@given(st.permutations(range(8)), st.integers(0, 2**32 - 1), st.lists(st.integers(1, 8), min_size=8, max_size=8))
def test_any_order_and_any_grouping_give_the_same_bits(order, seed, sizes):
    updates = [update(SMALL, seed + place) for place in range(8)]
    exact = np.sum([one.codes for one in updates], axis=0, dtype=np.int64)
    straight, shuffled = Sum(SMALL, GRID), Sum(SMALL, GRID)
    for one in updates:
        straight.add(one)
    rest = list(order)
    for size in sizes:
        shuffled.add(*(updates[place] for place in rest[:size]))
        rest = rest[size:]
    same(straight.result(), shuffled.result())
    assert np.array_equal(straight.result().codes.astype(np.int64), exact)


def test_many_blocks_with_an_odd_tail():
    updates = [update(LARGE, seed) for seed in range(5)]
    total = Sum(LARGE, GRID)
    total.add(*updates[:3])
    total.add(updates[3])
    total.add(updates[4])
    assert np.array_equal(total.result().codes, np.sum([one.codes for one in updates], axis=0))
    assert total.result().count == 5


@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_cohort_at_the_bound_does_not_wrap(sign):
    total = Sum(SMALL, GRID)
    for seed in range(8):
        total.add(update(SMALL, seed, codes=np.full(SMALL.size, sign * GRID.limit, np.int32), weight=1.0))
    assert (total.result().codes == sign * 2**30).all()
    with pytest.raises(UpdateError, match="room for 8"):
        total.add(update(SMALL, 9))


@pytest.mark.parametrize("place", [0, 5, BLOCK - 1, BLOCK, 2 * BLOCK, LARGE.size - 1])
@pytest.mark.parametrize("value", [GRID.limit + 1, -GRID.limit - 1, 2**31 - 1, -(2**31)])
def test_a_code_beyond_the_bound_is_refused_and_leaves_no_trace(place, value):
    total, clean = Sum(LARGE, GRID), Sum(LARGE, GRID)
    total.add(update(LARGE, 0))
    clean.add(update(LARGE, 0))
    liar = update(LARGE, 1)
    liar.codes[place] = value
    name = "q.lora_A.weight" if place < 2 * BLOCK else "q.lora_B.weight"
    for group in ((liar,), (update(LARGE, 2), liar, update(LARGE, 3))):
        with pytest.raises(UpdateError, match=f"update: {name} holds .* may send at most"):
            total.add(*group)
        same(total.result(), clean.result())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"layout": LARGE}, "layouts differ"),
        ({"grid": Grid(4)}, "answered another round"),
        ({"codes": np.zeros(3, np.int32)}, r"codes are int32\[3\], the plan needs int32\[12\]"),
        ({"codes": np.zeros(12, np.float32)}, r"float32\[12\]"),
        ({"codes": np.zeros((3, 4), np.int32)}, r"int32\[3, 4\]"),
        ({"weight": 0.0}, "weighs itself"),
        ({"weight": -0.5}, "weighs itself"),
        ({"weight": 1e9}, "weighs itself"),
        ({"weight": float("nan")}, "weighs itself"),
        ({"weight": float("inf")}, "weighs itself"),
        ({"weight": 0.1}, "multiple of 2"),
        ({"count": 0}, "stands for 0 sites"),
        ({"count": 9}, "stands for 9 sites"),
        ({"counters": {"loss": (float("nan"),)}}, "counter loss"),
        ({"counters": {"loss": (1.0, 2.0)}}, "counter loss: 2 values, the sum has 1"),
    ],
)
def test_every_lie_is_named_and_leaves_no_trace(changes, fault):
    total, clean = Sum(SMALL, GRID), Sum(SMALL, GRID)
    total.add(update(SMALL, 0))
    clean.add(update(SMALL, 0))
    with pytest.raises(UpdateError, match=fault) as caught:
        total.add(update(SMALL, 1, **changes))
    assert "\n" not in str(caught.value)
    same(total.result(), clean.result())


def test_partial_sums_of_several_sites_add_as_one():
    left, right, whole = Sum(SMALL, GRID), Sum(SMALL, GRID), Sum(SMALL, GRID)
    left.add(update(SMALL, 0), update(SMALL, 1))
    right.add(update(SMALL, 2))
    whole.add(left.result(), right.result())
    straight = Sum(SMALL, GRID)
    straight.add(*(update(SMALL, seed) for seed in range(3)))
    same(whole.result(), straight.result())


def test_a_result_does_not_change_afterwards():
    total = Sum(SMALL, GRID)
    total.add(update(SMALL, 0))
    first = total.result()
    kept = first.codes.copy()
    total.add(update(SMALL, 1))
    assert np.array_equal(first.codes, kept)
    assert first.count == 1
    assert total.result().count == 2


def test_nothing_of_an_update_is_held():
    total, one = Sum(SMALL, GRID), update(SMALL, 0)
    total.add(one)
    gone = weakref.ref(one), weakref.ref(one.codes)
    del one
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


def test_read_only_views_of_received_bytes_add():
    one = update(SMALL, 0)
    view = np.frombuffer(one.codes.tobytes(), np.int32)
    total = Sum(SMALL, GRID)
    total.add(replace(one, codes=view))
    assert np.array_equal(total.result().codes, one.codes)


def test_an_empty_sum_is_zero():
    assert Sum(SMALL, GRID).result().count == 0
    with pytest.raises(UpdateError, match="no site contributed"):
        Sum(SMALL, GRID).result().mean()
