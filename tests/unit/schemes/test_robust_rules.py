"""Each robust rule against its slow form over dense products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.schemes.parts import PHASES, SEEDS, WIDE, apart, changes, dense, drawn, krum_order

from fedpeft.errors import CohortError, UpdateError
from fedpeft.schemes import FFA, Alternating, Part, Phase
from fedpeft.schemes.robust import (
    RFA,
    Bulyan,
    FLTrust,
    Krum,
    Median,
    MultiKrum,
    NormBound,
    Rooted,
    Trimmed,
    rfa_by_sums,
    rfa_weight,
)
from fedpeft.schemes.robust.geometry import growth, metric, resize
from fedpeft.schemes.robust.rule import shares
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update

# coordinates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 5, 8, 13, 16, 31, 50])
def test_median_and_trimmed_mean_are_numpy_s(draw, count):
    phase = Phase("all", WIDE.roles)
    current, parts = drawn(WIDE, phase, count, draw, count)
    table = np.stack([part.values.flat for part in parts])
    median = Median().combine(current, parts, phase).flat
    np.testing.assert_allclose(median, np.median(table.astype(np.float64), axis=0), rtol=0, atol=1e-7)
    for share in (0.34, 0.45):
        cut = int(share * count)
        kept = np.sort(table, axis=0)[cut : count - cut]
        got = Trimmed(share).combine(current, parts, phase).flat
        np.testing.assert_allclose(got, kept.mean(axis=0, dtype=np.float64), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, count=st.integers(3, 24), ties=st.booleans())
def test_median_of_any_count_with_ties(layouts, draw, seed, count, ties):
    layout, phase = layouts["prompt"], Phase("all", frozenset({"prompt"}))
    current, parts = drawn(layout, phase, count, draw, seed)
    if ties:
        parts = [Part(1.0, Tensors(layout, np.round(part.values.flat * 4))) for part in parts]
    table = np.stack([part.values.flat for part in parts])
    np.testing.assert_array_equal(Median().combine(current, parts, phase).flat, np.median(table, axis=0))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, f=st.integers(0, 3), more=st.integers(0, 4))
def test_bulyan_against_loops(layouts, draw, seed, f, more):
    layout, phase = layouts["lora"], FFA().phase(1, layouts["lora"])
    current, parts = drawn(layout, phase, 4 * f + 3 + more, draw, seed)
    squared, left, chosen = apart(dense(current, phase, parts)), list(range(len(parts))), []
    while len(chosen) < len(parts) - 2 * f:
        chosen.append(left.pop(krum_order(squared[np.ix_(left, left)], f)[0]))
    table = np.stack([parts[place].values.flat for place in chosen]).astype(np.float64)
    oracle = []
    for column in table.T:
        middle = np.median(column)
        oracle.append(np.mean(sorted(column, key=lambda value, middle=middle: abs(value - middle))[: len(parts) - 4 * f]))
    np.testing.assert_allclose(Bulyan(f).combine(current, parts, phase).flat, oracle, rtol=0, atol=2e-6)


# selection and averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "phase"), PHASES)
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, f=st.integers(0, 2), more=st.integers(0, 3))
def test_krum_and_multikrum_against_loops_over_dense_products(layouts, draw, name, phase, seed, f, more):
    current, parts = drawn(layouts[name], phase, 2 * f + 3 + more, draw, seed)
    order = krum_order(apart(dense(current, phase, parts)), f)
    assert Krum(f).combine(current, parts, phase).digest == parts[order[0]].values.digest
    m = len(parts) - f - 2
    oracle = np.mean([parts[place].values.flat.astype(np.float64) for place in order[:m]], axis=0)
    np.testing.assert_allclose(MultiKrum(f).combine(current, parts, phase).flat, oracle, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "phase"), PHASES)
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, count=st.integers(3, 9), steps=st.integers(1, 6))
def test_geometric_median_against_weiszfeld_on_dense_products(layouts, draw, name, phase, seed, count, steps):
    current, parts = drawn(layouts[name], phase, count, draw, seed)
    table, share = dense(current, phase, parts), shares(parts)
    at = share
    for _ in range(steps):
        pull = share / np.maximum(np.linalg.norm(at @ table - table, axis=1), 1e-6)
        at = pull / pull.sum()
    oracle = at @ np.stack([part.values.flat.astype(np.float64) for part in parts])
    np.testing.assert_allclose(RFA(steps).combine(current, parts, phase).flat, oracle, rtol=0, atol=2e-5)


def test_geometric_median_of_many_steps_is_a_minimum(layouts, draw):
    layout, phase = layouts["prompt"], Phase("all", frozenset({"prompt"}))
    current, parts = drawn(layout, phase, 9, draw)
    table, share = np.stack([part.values.flat for part in parts]).astype(np.float64), shares(parts)

    def cost(point):
        return float(share @ np.linalg.norm(table - point, axis=1))

    found = RFA(300).combine(current, parts, phase).flat.astype(np.float64)
    rng = np.random.default_rng(0)
    assert all(cost(found) <= cost(found + 1e-3 * rng.standard_normal(found.size)) + 1e-9 for _ in range(100))


@pytest.mark.parametrize(("name", "phase"), [case for case in PHASES if case[1].name != "all" or case[0] != "lora"])
def test_geometric_median_from_sums_alone_is_the_direct_one(layouts, draw, name, phase):
    """Through the integer ring too: each step is one weighted sum, the weights are the sites' own."""
    current, parts = drawn(layouts[name], phase, 7, draw, 3)
    parts = [Part(0.5 + part.weight / 2, part.values) for part in parts]
    grid, nu = Grid(7, 4.0), 0.05

    def average(centre, ring):
        weights = [part.weight if centre is None else rfa_weight(current, part, centre, phase, nu) for part in parts]
        if ring:
            return sum(
                (Update.encode(p.values, w, {}, grid) for p, w in zip(parts, weights, strict=True)),
                Update.zero(parts[0].values.layout, grid),
            ).mean()
        table = np.stack([part.values.flat.astype(np.float64) for part in parts])
        return Tensors(parts[0].values.layout, (np.array(weights) @ table / np.sum(weights)).astype(np.float32))

    direct = RFA(4, nu).combine(current, parts, phase).flat
    np.testing.assert_allclose(rfa_by_sums(lambda centre: average(centre, False), 4).flat, direct, rtol=0, atol=5e-6)
    np.testing.assert_allclose(rfa_by_sums(lambda centre: average(centre, True), 4).flat, direct, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_norm_bound_cuts_to_the_length_in_product_space(layouts, draw, name, phase):
    current, parts = drawn(layouts[name], phase, 5, draw, 7)
    parts = [Part(part.weight, part.values.scaled(factor)) for part, factor in zip(parts, (0.1, 0.5, 1, 4, 30), strict=True)]
    lengths = np.linalg.norm(dense(current, phase, parts), axis=1)
    for bound in (0.0, float(lengths[1])):
        limit = bound or np.median(lengths)
        rows = growth(metric(current, phase), [part.values for part in parts])
        cut = [
            Part(part.weight, part.values.scaled(1.0 if n <= limit else resize(row, limit)))
            for part, n, row in zip(parts, lengths, rows, strict=True)
        ]
        seen = np.linalg.norm(dense(current, phase, cut), axis=1)
        np.testing.assert_allclose(seen, np.minimum(lengths, limit), rtol=1e-5)
        oracle = shares(parts) @ np.stack([part.values.flat.astype(np.float64) for part in cut])
        np.testing.assert_allclose(NormBound(bound).combine(current, parts, phase).flat, oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_fltrust_weighs_by_the_angle_to_the_root(layouts, draw, name, phase):
    current, (root, *parts) = drawn(layouts[name], phase, 6, draw, 5)
    parts = [Part(part.weight, root.values + part.values) for part in parts[:4]]
    parts.append(Part(1.0, root.values.scaled(-9.0)))
    table, guide = dense(current, phase, parts), changes(current, phase, root.values)
    trust = np.maximum(table @ guide / np.linalg.norm(table, axis=1) / np.linalg.norm(guide), 0.0)
    got = FLTrust().combine_rooted(current, parts, phase, root.values)
    if name != "lora" or phase.name != "all":
        assert trust[4] == 0.0
        scaled = table * (np.linalg.norm(guide) / np.linalg.norm(table, axis=1))[:, None]
        oracle = trust @ scaled / trust.sum()
        np.testing.assert_allclose(changes(current, phase, got), oracle, rtol=0, atol=1e-4)
    assert np.linalg.norm(changes(current, phase, got)) <= 1.5 * np.linalg.norm(guide)


def test_fltrust_faults(layouts, draw):
    phase = Alternating().phase(1, layouts["lora"])
    current, (root, *parts) = drawn(layouts["lora"], phase, 4, draw)
    assert isinstance(FLTrust(), Rooted)
    assert not isinstance(RFA(), Rooted)
    with pytest.raises(UpdateError, match="without such rows combine rfa"):
        FLTrust().combine(current, parts, phase)
    with pytest.raises(UpdateError, match="root delta is zero"):
        FLTrust().combine_rooted(current, parts, phase, root.values.scaled(0.0))
    with pytest.raises(UpdateError, match="root is not finite or of another layout"):
        FLTrust().combine_rooted(current, parts, phase, current)
    against = [Part(1.0, root.values.scaled(-1.0))]
    with pytest.raises(CohortError, match="no part points the root's way"):
        FLTrust().combine_rooted(current, against, phase, root.values)
