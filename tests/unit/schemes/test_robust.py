"""Combine rules against slow oracles in float64: products formed densely, medians by numpy, Krum by loops."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import build, describe
from fedpeft.errors import CohortError, UpdateError
from fedpeft.schemes import FFA, SCHEMES, Alternating, FedAvg, Part, Phase
from fedpeft.schemes.robust import (
    COMBINES,
    RFA,
    Buckets,
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
from fedpeft.schemes.robust.coordinates import COLUMNS
from fedpeft.schemes.robust.geometry import distances, gram, growth, metric, resize
from fedpeft.schemes.robust.rule import blend, shares
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update

WIDE = Layout.of([Entry("bias", "wide.bias", (2 * COLUMNS + 77,)), Entry("head", "head.weight", (3, 5))])
BOTH = Phase("all", frozenset({"A", "B", "head", "bias"}))
CORE = Phase("R", frozenset({"R", "head", "bias"}))
SEEDS = st.integers(0, 2**32 - 1)


def drawn(layout, phase, count, draw, seed=0, scale=0.3):
    """A current adapter and the parts of ``count`` sites in ``phase``."""
    rng = np.random.default_rng(seed)
    current = draw(layout, rng)
    own = layout.subset(phase.roles)
    return current, [Part(float(rng.uniform(0.2, 1.0)), draw(own, rng, scale)) for _ in range(count)]


def changes(current, phase, part, scale=1.0):
    """What a part changes, formed densely in float64: every product of factors, then all other travelling values."""
    layout = current.layout
    before = {name: value.astype(np.float64) for name, value in current.named().items()}
    after = {name: value + scale * part.named().get(name, np.zeros(1)).astype(np.float64) for name, value in before.items()}

    def products(named):
        for entry in layout.entries:
            if entry.role == "A":
                b, core = named[entry.name.replace("_A", "_B")], named.get(entry.name.replace("_A", "_R"))
                yield b @ (core if core is not None else np.eye(b.shape[1])) @ named[entry.name]

    factors = {"A", "B", "R"} if "A" in layout.roles else set()
    dense = [(new - old).ravel() for new, old in zip(products(after), products(before), strict=True)]
    return np.concatenate([*dense, (part.pick(phase.roles - factors).flat * np.float64(scale)).ravel()])


def dense(current, phase, parts, scale=1.0):
    return np.stack([changes(current, phase, part.values, scale) for part in parts])


def apart(table):
    return np.square(table[:, None] - table[None, :]).sum(axis=2)


def krum_order(squared, f):
    """Krum by loops: the sum of the n - f - 2 smallest distances to others."""
    scores = []
    for i in range(len(squared)):
        others = sorted(squared[i][j] for j in range(len(squared)) if j != i)
        scores.append(sum(others[: max(len(squared) - f - 2, 1)]))
    return sorted(range(len(squared)), key=lambda i: (scores[i], sum(squared[i])))


PHASES = [
    ("lora", FedAvg().phase(1, Layout.of([Entry("A", "a", (1, 1)), Entry("B", "b", (1, 1))]))),
    ("lora", Phase("B", frozenset({"B", "head", "bias"}))),
    ("lora", Phase("A", frozenset({"A", "head", "bias"}))),
    ("lora", BOTH),
    ("dora", Phase("B", frozenset({"B", "M", "head", "bias"}))),
    ("core", CORE),
    ("core", Phase("B", frozenset({"B", "head", "bias"}))),
    ("core", Phase("A", frozenset({"A", "head", "bias"}))),
    ("ia3", Phase("all", frozenset({"scale", "head", "bias"}))),
    ("bottleneck", Phase("all", frozenset({"down", "up"}))),
]


@pytest.mark.parametrize(("name", "phase"), PHASES)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_inner_products_in_factors_are_those_of_the_dense_products(layouts, draw, name, phase, seed):
    current, parts = drawn(layouts[name], phase, 5, draw, seed)
    measure, values = metric(current, phase), [part.values for part in parts]
    oracle = dense(current, phase, parts)
    table = oracle @ oracle.T
    np.testing.assert_allclose(gram(measure, values), table, rtol=0, atol=2e-6 * table.max())
    np.testing.assert_allclose(gram(measure, values, np.float64), table, rtol=0, atol=1e-12 * table.max())
    np.testing.assert_allclose(distances(measure, values), apart(oracle), rtol=0, atol=4e-6 * table.max())
    coefficients = growth(measure, values)
    for s in (0.3, 1.0, 2.5):
        lengths = np.square(dense(current, phase, parts, s)).sum(axis=1)
        np.testing.assert_allclose(coefficients @ [s**2, s**3, s**4], lengths, rtol=1e-9)


def test_distances_of_close_parts_keep_their_digits(layouts, draw):
    current, parts = drawn(layouts["lora"], Alternating().phase(1, layouts["lora"]), 4, draw)
    phase = Alternating().phase(1, layouts["lora"])
    near = [Tensors(p.values.layout, parts[0].values.flat + np.float32(1e-4) * p.values.flat) for p in parts]
    oracle = apart(dense(current, phase, [Part(1.0, value) for value in near]))
    np.testing.assert_allclose(distances(metric(current, phase), near), oracle, rtol=1e-6)


def test_a_factor_s_gauge_does_not_matter(layouts, draw):
    """(B G, G^-1 A) is the same adapter: its parts have the same distances."""
    layout = layouts["lora"]
    current, parts = drawn(layout, BOTH, 5, draw)
    gauge = {"q": np.random.default_rng(1).standard_normal((3, 3)) + 3 * np.eye(3), "v": np.array([[2.0, 1.0], [0.5, -1.0]])}

    def turned(named):
        out = {}
        for name, value in named.items():
            g = gauge.get(name[0])
            out[name] = value @ g if "lora_B" in name else np.linalg.solve(g, value) if "lora_A" in name else value
        return out

    moved = Tensors.from_named(layout, turned(current.named()))
    same = [Tensors.from_named(layout, turned(part.values.named())) for part in parts]
    here = distances(metric(current, BOTH), [part.values for part in parts])
    np.testing.assert_allclose(distances(metric(moved, BOTH), same), here, rtol=1e-4)


def test_a_factor_whose_partner_stays_at_the_sites_is_measured_as_it_is(layouts, draw):
    """FedSA: every site has a B of its own, and the coordinator's is zero."""
    layout = layouts["lora"]
    phase = Phase("A", frozenset({"A", "head", "bias"}), private=frozenset({"B"}))
    current, parts = drawn(layout, phase, 5, draw)
    current = current.patch(Tensors.zeros(layout.subset({"B"})))
    table = np.stack([part.values.flat.astype(np.float64) for part in parts])
    np.testing.assert_allclose(distances(metric(current, phase), [part.values for part in parts]), apart(table), rtol=1e-5)


def test_factors_that_do_not_pair_are_measured_as_they_are(draw):
    """Several B on one A."""
    shared = Layout.of([Entry("A", "q.A", (2, 6)), Entry("B", "q.B.0", (5, 2)), Entry("B", "q.B.1", (5, 2))])
    for phase in (Phase("all", frozenset({"A", "B"})), Phase("B", frozenset({"B"}))):
        current, parts = drawn(shared, phase, 5, draw)
        table = np.stack([part.values.flat.astype(np.float64) for part in parts])
        np.testing.assert_allclose(distances(metric(current, phase), [part.values for part in parts]), apart(table), rtol=1e-5)


def test_what_a_scheme_sends_beside_the_phase_is_blended_but_not_measured(layouts, draw):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 5, draw)
    more = Layout.of([*parts[0].values.layout.entries, Entry("probe", "q.probe", (3, 4))])
    rng = np.random.default_rng(2)
    wider = [Part(p.weight, draw(more, rng, 1e3).patch(p.values)) for p in parts]
    chosen = Krum(1).combine(current, wider, phase)
    assert chosen.pick(phase.roles).digest == Krum(1).combine(current, parts, phase).digest
    assert any(chosen.digest == part.values.digest for part in wider)
    median = Median().combine(current, wider, phase).pick({"probe"}).flat
    np.testing.assert_array_equal(median, np.median([part.values.pick({"probe"}).flat for part in wider], axis=0))


@pytest.mark.parametrize("kind", sorted(SCHEMES))
def test_every_phase_of_every_scheme_is_measured_or_refused_by_name(layouts, draw, kind):
    """Seven sites send noise in the layout that the scheme's sites send; every rule answers or says which scheme to take."""
    scheme, rng, seen = SCHEMES[kind](), np.random.default_rng(0), 0
    for layout in layouts.values():
        try:
            scheme.check(layout)
        except UpdateError:
            continue
        for round in (1, 2, 3, 4):
            phase, current = scheme.phase(round, layout), draw(layout, rng)
            parts = [Part(1.0, draw(scheme.travels(layout, phase), rng)) for _ in range(7)]
            for rule in (Median(), Krum(1), Bulyan(1), RFA(), NormBound()):
                try:
                    rule.check(layout, phase)
                except UpdateError as fault:
                    found = str(fault)
                else:
                    found = f"finite: {rule.combine(current, parts, phase).finite}"
                assert re.search("finite: True|multiply and move in one round|use scheme fedsb", found)
                seen += 1
    assert seen


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


# robustness ----------------------------------------------------------------------------------------------------------------

GUARDED = [
    Median(),
    Trimmed(0.3),
    Krum(3),
    MultiKrum(3),
    MultiKrum(3, 2),
    Bulyan(3),
    RFA(64),
    NormBound(),
    Buckets(2, Median()),
    Buckets(2, RFA(64)),
    Buckets(3, Krum(1)),
]


def attacked(layouts, draw, seed, lie, liars, count=15):
    """Honest parts near a common drift, liars put in by ``lie(honest mean, rng)``, which also claim a huge example count."""
    layout = layouts["lora"]
    phase, rng = Alternating().phase(1, layout), np.random.default_rng(seed)
    current, own = draw(layout, rng), layout.subset(phase.roles)
    drift = draw(own, rng)
    honest = [Part(float(rng.uniform(0.3, 1.0)), drift + draw(own, rng, 0.1)) for _ in range(count - liars)]
    false = [Part(1e9, Tensors(own, lie(drift.flat, rng).astype(np.float32))) for _ in range(liars)]
    return current, honest, honest + false, drift, phase


LIES = {
    "sign flip": lambda drift, rng: -10.0 * drift,
    "huge": lambda drift, rng: 1e6 * rng.standard_normal(drift.size),
    "same far point": lambda drift, rng: drift + 100.0,
    "hidden in one coordinate": lambda drift, rng: drift + 1e3 * (np.arange(drift.size) == 2),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("rule", GUARDED, ids=str)
def test_few_liars_do_not_move_the_result_out_of_the_honest_ball(layouts, draw, rule, lie):
    liars = 1 if isinstance(rule, Buckets) else 3
    for seed in range(4):
        current, honest, parts, drift, phase = attacked(layouts, draw, seed, LIES[lie], liars)
        got = rule.combine(current, parts, phase)
        radius = max((part.values - drift).norm() for part in honest)
        if isinstance(rule, NormBound):
            assert got.norm() <= 1.01 * max(part.values.norm() for part in honest)
        else:
            assert (got - drift).norm() <= 1.5 * radius
        if isinstance(rule, (Median, Trimmed)):
            table = np.stack([part.values.flat for part in honest])
            assert ((got.flat >= table.min(axis=0) - 1e-6) & (got.flat <= table.max(axis=0) + 1e-6)).all()
    plain = np.mean([part.values.flat.astype(np.float64) for part in parts], axis=0)
    assert np.linalg.norm(plain - drift.flat) > 3 * radius


@pytest.mark.parametrize("rule", [Krum(1), MultiKrum(1), RFA(64), NormBound()], ids=str)
def test_liars_under_two_free_factors(layouts, draw, rule):
    """Factor deltas of ordinary size with a huge product: only product space sees them."""
    layout, rng = layouts["lora"], np.random.default_rng(0)
    current, drift = draw(layout, rng), draw(layout, rng, 0.2)
    honest = [Part(1.0, drift + draw(layout, rng, 0.02)) for _ in range(8)]
    liar = Part(1.0, current.scaled(-5.0))
    got = rule.combine(current, [*honest, liar], BOTH)
    target, radius = changes(current, BOTH, drift), max(np.linalg.norm(changes(current, BOTH, p.values - drift)) for p in honest)
    if isinstance(rule, NormBound):
        assert np.linalg.norm(changes(current, BOTH, got)) <= 1.05 * max(np.linalg.norm(changes(current, BOTH, p.values)) for p in honest)
    else:
        assert np.linalg.norm(changes(current, BOTH, got) - target) <= 2 * radius


def test_a_site_that_claims_a_billion_examples_counts_twice_at_most(layouts, draw):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 5, draw)
    parts = [Part(0.5, part.values) for part in parts]
    liar = [*parts[:4], Part(1e9, parts[4].values)]
    assert shares(liar).tolist() == [1 / 6] * 4 + [2 / 6]
    for rule in (Median(), Krum(1), MultiKrum(1), Trimmed(0.2), Bulyan(0)):
        assert rule.combine(current, liar, phase).digest == rule.combine(current, parts, phase).digest


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, order=st.permutations(range(11)))
def test_the_order_of_arrival_does_not_matter(layouts, draw, seed, order):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 11, draw, seed)
    shuffled = [parts[place] for place in order]
    for rule in (Median(), Trimmed(), Krum(2), MultiKrum(2), Bulyan(2), RFA(), NormBound()):
        here, there = rule.combine(current, parts, phase), rule.combine(current, shuffled, phase)
        np.testing.assert_allclose(there.flat, here.flat, rtol=0, atol=1e-6)
        if isinstance(rule, (Median, Trimmed, Krum)):
            assert here.digest == there.digest


@pytest.mark.parametrize("rule", [*GUARDED, FLTrust()], ids=str)
def test_nothing_is_mutated_and_equal_parts_are_kept(layouts, draw, rule):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 1, draw)
    parts = [Part(1.0, Tensors(parts[0].values.layout, parts[0].values.flat.copy())) for _ in range(15)]
    prints = current.digest, [part.values.digest for part in parts]
    got = rule.combine_rooted(current, parts, phase, parts[0].values) if isinstance(rule, FLTrust) else rule.combine(current, parts, phase)
    np.testing.assert_allclose(got.flat, parts[0].values.flat, rtol=1e-5)
    assert prints == (current.digest, [part.values.digest for part in parts])
    assert not any(np.shares_memory(got.flat, part.values.flat) for part in parts)


# buckets -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(count=st.integers(1, 60), size=st.integers(2, 9), seed=SEEDS)
def test_groups_are_a_partition_and_none_is_too_small(count, size, seed):
    groups = Buckets(size).groups(count, seed)
    assert sorted(place for group in groups for place in group) == list(range(count))
    assert all(len(group) >= min(size, count) for group in groups)
    assert groups == Buckets(size).groups(count, seed)


def test_buckets_from_the_groups_sums_alone_are_buckets_of_the_parts(layouts, draw):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 17, draw)
    parts = [Part(round(0.5 + part.weight / 4, 2), part.values) for part in parts]
    for rule in (Median(), RFA(8), Krum(1), NormBound()):
        bucket, grid = Buckets(3, rule), Grid(8, 4.0)
        sums = []
        for places in bucket.groups(17, 5):
            total = Update.zero(parts[0].values.layout, grid)
            for place in places:
                total += Update.encode(parts[place].values, parts[place].weight, {}, grid)
            sums.append(total)
        apart = bucket.combine(current, parts, phase, 5)
        np.testing.assert_allclose(bucket.combine_sums(current, sums, phase).flat, apart.flat, rtol=0, atol=2e-5)
    with pytest.raises(UpdateError, match="group 0 is a sum over 1 sites, at least 3 must hide in it"):
        Buckets(3).combine_sums(current, [Update.encode(parts[0].values, 1.0, {}, grid)], phase)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 8))
def test_a_blend_is_summed_in_float64(layouts, draw, seed, count):
    _, parts = drawn(layouts["ia3"], FedAvg().phase(1, layouts["ia3"]), count, draw, seed)
    weights = np.random.default_rng(seed).uniform(-1.0, 1.0, count)
    exact = weights @ np.stack([part.values.flat.astype(np.float64) for part in parts])
    np.testing.assert_allclose(blend(parts, weights).flat, exact, rtol=6.1e-8, atol=1e-15)


# table and faults ----------------------------------------------------------------------------------------------------------


def test_every_rule_is_built_from_its_table_and_described_back():
    tables = [{"kind": kind} for kind in COMBINES]
    tables += [{"kind": "buckets", "size": 4, "rule": {"kind": "krum", "f": 2}}, {"kind": "trimmed", "share": 0.1}]
    for table in tables:
        rule = build(COMBINES, table, "combine")
        assert rule == build(COMBINES, describe(rule), "combine")
        assert describe(rule).items() >= {key: value for key, value in table.items() if key != "rule"}.items()
        assert rule.sum_only == (rule.kind == "buckets")
    assert build(COMBINES, tables[-2], "combine") == Buckets(4, Krum(2))
    for bad in (
        {"kind": "trimmed", "share": 0.5},
        {"kind": "krum", "f": -1},
        {"kind": "buckets", "size": 1},
        {"kind": "buckets", "rule": "fltrust"},
    ):
        with pytest.raises(ValueError, match=bad["kind"]):
            build(COMBINES, bad, "combine")


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (Median(), 3),
        (Trimmed(0.1), 10),
        (Trimmed(0.4), 3),
        (Krum(2), 7),
        (MultiKrum(2), 7),
        (MultiKrum(1, 9), 12),
        (Bulyan(2), 11),
        (RFA(), 3),
        (NormBound(), 3),
        (NormBound(1.0), 1),
        (Buckets(4, Krum(1)), 20),
    ],
    ids=str,
)
def test_too_few_parts_are_refused_by_name(layouts, draw, rule, least):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, least, draw)
    assert rule.least == least
    rule.combine(current, parts, phase)
    with pytest.raises(CohortError, match=f"{rule.kind}: {least - 1} parts came, this setting needs at least {least}"):
        rule.combine(current, parts[1:], phase)


@pytest.mark.parametrize("rule", [Median(), Trimmed(), Bulyan(), Buckets(2, Median())], ids=str)
def test_rules_by_coordinate_are_refused_where_a_product_moves(layouts, draw, rule):
    for name in ("lora", "bottleneck", "dora"):
        phase = FedAvg().phase(1, layouts[name])
        current, parts = drawn(layouts[name], phase, 20, draw)
        with pytest.raises(UpdateError, match=r"multiply and move in one round.*\(alternating, ffa\)"):
            rule.combine(current, parts, phase)
    rule.check(layouts["prompt"], FedAvg().phase(1, layouts["prompt"]))
    rule.check(Layout.of([Entry("skew", "q.skew", (3, 3))]), Phase("all", frozenset({"skew"})))
    rule.check(layouts["lora"], FFA().phase(1, layouts["lora"]))


@pytest.mark.parametrize("rule", [Krum(), MultiKrum(), RFA(), NormBound(), FLTrust()], ids=str)
def test_three_moving_factors_are_refused(layouts, rule):
    with pytest.raises(UpdateError, match=f"{rule.kind}: phase 'all' moves .*'A', 'B', 'R'.* use scheme fedsb"):
        rule.check(layouts["core"], Phase("all", layouts["core"].roles))
    rule.check(layouts["core"], CORE)


@pytest.mark.parametrize("rule", GUARDED, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_part_that_is_not_finite_never_gets_through(layouts, draw, rule, value):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 15, draw)
    parts[4].values.flat[3] = value
    if isinstance(getattr(rule, "rule", rule), (Median, Trimmed)) and value == np.inf:
        assert rule.combine(current, parts, phase).finite
        return
    with pytest.raises(UpdateError, match="not finite"):
        rule.combine(current, parts, phase)


@pytest.mark.parametrize("rule", [Krum(), RFA(), NormBound(), NormBound(1.0)], ids=str)
@pytest.mark.parametrize("name", ["q.lora_A.weight", "v.lora_B.weight", "classifier.bias"])
def test_a_value_that_is_not_finite_is_named_in_every_role(layouts, draw, rule, name):
    current, parts = drawn(layouts["lora"], BOTH, 5, draw)
    parts[3].values.named()[name].flat[1] = np.nan
    with pytest.raises(UpdateError, match="part 3 is not finite"):
        rule.combine(current, parts, BOTH)


def test_parts_that_do_not_belong_together_are_named(layouts, draw):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 5, draw)
    with pytest.raises(UpdateError, match="rfa: parts 0 and 4 are of different layouts"):
        RFA().combine(current, [*parts[:4], Part(1.0, current)], phase)
    for weight in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UpdateError, match="rfa: part 4 weighs"):
            RFA().combine(current, [*parts[:4], Part(weight, parts[4].values)], phase)
