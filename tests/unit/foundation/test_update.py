"""Laws of updates: an exact monoid, whose mean is the float64 mean to within the grid."""

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft.errors import UpdateError
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import COUNTER_LIMIT, WEIGHT_STEP, Grid, Update, add_counters, snap_counters

LAYOUT = Layout.of([Entry("A", "q.lora_A.weight", (2, 3)), Entry("B", "q.lora_B.weight", (3, 2)), Entry("head", "c.weight", (2,))])
OTHER = Layout.of([Entry("A", "q.lora_A.weight", (2, 7))])
GRIDS = st.builds(Grid, st.integers(1, 10_000), st.floats(1e-4, 64.0))
COUNTERS = st.dictionaries(st.sampled_from(["loss", "count", "tp"]), st.tuples(st.floats(-1e6, 1e6)), max_size=3)


@st.composite
def cohorts(draw, least=1):
    grid = draw(GRIDS)
    size = draw(st.integers(least, min(grid.sites, 5)) if grid.sites >= least else st.just(grid.sites))
    values = hnp.arrays(np.float32, LAYOUT.size, elements=st.floats(-1, 1, width=32))
    deltas = [Tensors(LAYOUT, draw(values) * np.float32(grid.reach * 0.99)) for _ in range(size)]
    weights = draw(st.lists(st.floats(1e-3, 1.0), min_size=size, max_size=size))
    return grid, deltas, weights, [draw(COUNTERS) for _ in range(size)]


@given(GRIDS)
def test_the_full_cohort_at_its_limit_stays_in_32_bits(grid):
    assert grid.limit >= 1
    assert grid.sites * grid.limit <= 2**30
    assert grid.reach <= grid.limit * grid.step
    assert np.log2(grid.step) == int(np.log2(grid.step))


@given(cohorts(), st.randoms())
def test_the_sum_is_the_same_bits_in_any_order_and_grouping(cohort, shuffle):
    grid, deltas, weights, counters = cohort
    updates = [Update.encode(d, w, c, grid) for d, w, c in zip(deltas, weights, counters, strict=True)]
    forward = reduce(add, updates, Update.zero(LAYOUT, grid))
    shuffle.shuffle(updates)
    cut = len(updates) // 2
    halves = [reduce(add, part, Update.zero(LAYOUT, grid)) for part in (updates[:cut], updates[cut:])]
    backward = halves[1] + halves[0]
    assert np.array_equal(forward.codes, backward.codes)
    assert (forward.weight, forward.count, forward.counters) == (backward.weight, backward.count, backward.counters)


@given(cohorts())
def test_the_mean_is_the_float64_mean_to_within_half_a_step_per_site(cohort):
    grid, deltas, weights, counters = cohort
    total = reduce(add, (Update.encode(d, w, c, grid) for d, w, c in zip(deltas, weights, counters, strict=True)))
    snapped = [max(round(w / WEIGHT_STEP), 1) * WEIGHT_STEP for w in weights]
    oracle = sum(w * d.flat.astype(np.float64) for w, d in zip(snapped, deltas, strict=True)) / sum(snapped)
    allowed = 0.5 * grid.step * len(deltas) / sum(snapped) + np.abs(oracle) * np.finfo(np.float32).eps
    assert (np.abs(total.mean().flat.astype(np.float64) - oracle) <= allowed + 1e-45).all()
    assert total.weight == sum(snapped)


@given(cohorts())
def test_counters_are_exact_sums_of_what_was_snapped(cohort):
    grid, deltas, weights, counters = cohort
    total = reduce(add, (Update.encode(d, w, c, grid) for d, w, c in zip(deltas, weights, counters, strict=True)))
    for name in {name for table in counters for name in table}:
        snapped = [snap_counters(table)[name][0] for table in counters if name in table]
        assert total.counters[name] == (float(np.sum(np.array(snapped) * 2.0**20)) / 2.0**20,)
        assert abs(total.counters[name][0] - sum(table[name][0] for table in counters if name in table)) <= len(counters) * 2.0**-21 + 1e-8


@given(cohorts())
def test_zero_is_the_unit(cohort):
    grid, deltas, weights, counters = cohort
    update = Update.encode(deltas[0], weights[0], counters[0], grid)
    both = Update.zero(LAYOUT, grid) + update
    assert np.array_equal(both.codes, update.codes)
    assert (both.weight, both.count, dict(both.counters)) == (update.weight, 1, dict(update.counters))


def delta(value):
    return Tensors(LAYOUT, np.full(LAYOUT.size, value, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(UpdateError, match="not finite"):
        Update.encode(delta(value), 1.0, {}, Grid(4))
    with pytest.raises(UpdateError, match="counter loss"):
        Update.encode(delta(0.0), 1.0, {"loss": (value,)}, Grid(4))


def test_out_of_range_values_are_refused_and_the_edge_is_not():
    grid = Grid(4, 1.0)
    assert Update.encode(delta(1.0), 1.0, {}, grid).codes.max() == grid.limit
    with pytest.raises(UpdateError, match=r"largest weighted delta is 1.5, the plan allows 1;"):
        Update.encode(delta(-1.5), 1.0, {}, grid)
    for weight in (0.0, -1.0, 1.5, np.nan, 1e9):
        with pytest.raises(UpdateError, match="outside"):
            Update.encode(delta(0.0), weight, {}, grid)
    with pytest.raises(UpdateError, match="counter n"):
        snap_counters({"n": (2 * COUNTER_LIMIT,)})


def test_updates_of_another_layout_or_grid_do_not_add():
    update = Update.encode(delta(0.5), 1.0, {}, Grid(4))
    with pytest.raises(UpdateError, match="layouts differ"):
        update + Update.zero(OTHER, Grid(4))
    with pytest.raises(UpdateError, match="answered another round"):
        update + Update.zero(LAYOUT, Grid(8))
    with pytest.raises(UpdateError, match="no site contributed"):
        Update.zero(LAYOUT, Grid(4)).mean()
    with pytest.raises(UpdateError, match="counter n: 1 values, the sum has 2"):
        add_counters({"n": (1.0, 2.0)}, {"n": (1.0,)})


@pytest.mark.parametrize("bad", [(0, 1.0), (4, 0.0), (4, -1.0), (4, np.nan), (4, np.inf)])
def test_bad_grids_are_refused(bad):
    with pytest.raises(UpdateError, match="sites must be at least 1 and reach positive"):
        Grid(*bad)
