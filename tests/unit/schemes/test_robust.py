"""Combine rules against slow oracles in float64: products formed densely, medians by numpy, Krum by loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.schemes.parts import BOTH, CORE, SEEDS, changes, drawn

from fedpeft.config import build, describe
from fedpeft.errors import CohortError, UpdateError
from fedpeft.schemes import FFA, Alternating, FedAvg, Part, Phase
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
    Trimmed,
)
from fedpeft.schemes.robust.rule import blend, shares
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update

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
