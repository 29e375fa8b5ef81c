"""ALGORITHMS E.1: the product B A moves by exactly the weighted mean of the sites' products, or misses exactly the cross term."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import FFA, SCHEMES, SERVER_OPTIMIZERS, SGD, Alternating, Controls, FedAvg, Gathers, Part, SiteContext, check_start
from fedpeft.schemes.base import linear
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update

COHORTS = st.tuples(st.integers(0, 2**32 - 1), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(1, 4))


EVERY = [made() for made in SCHEMES.values()]
SUMS = [scheme for scheme in EVERY if not isinstance(scheme, Gathers)]


def fits(scheme, layout):
    """Whether the scheme takes adapters of ``layout``."""
    try:
        scheme.check(layout)
    except UpdateError:
        return False
    return True


def context(scheme, layout, phase, rng, index=0):
    """What a site knows, with random corrections where the scheme has them."""
    if not isinstance(scheme, Controls):
        return SiteContext(7, f"site-{index}")
    part = layout.subset(phase.roles)
    noise = [Tensors(part, rng.standard_normal(part.size).astype(np.float32) * np.float32(0.1)) for _ in range(3)]
    return SiteContext(7, f"site-{index}", control=(noise[0], noise[1]), gradient=noise[2])


def average(scheme, before, moves, shares, phase):
    """The mean of the contributions in float64, or what the scheme gathers of them."""
    if isinstance(scheme, Gathers):
        return scheme.gather(before, [Part(float(p), m) for p, m in zip(shares, moves, strict=True)], phase)
    mean = sum(p * m.flat.astype(np.float64) for p, m in zip(shares, moves, strict=True))
    return Tensors(moves[0].layout, mean.astype(np.float32))


def play(scheme, layout, draw, seed, weights, round):
    """One round from a random state: sites drift on the phase's roles; (before, sites, shares, after)."""
    rng = np.random.default_rng(seed)
    before, phase = draw(layout, rng), scheme.phase(round, layout)
    sites = [before.patch((before + draw(layout, rng, 0.3)).pick(phase.trains)) for _ in weights]
    shares = np.array(weights, np.float64) / np.sum(weights)
    moves = [scheme.contribution(before, site, phase, context(scheme, layout, phase, rng, i)) for i, site in enumerate(sites)]
    after, _ = scheme.advance(before, average(scheme, before, moves, shares, phase), phase, SGD(), {})
    return before, sites, shares, after


def gap(sites, shares, after, product, module):
    """Mean of the sites' products minus the product of the global factors, float64."""
    return sum(p * product(site, module) for p, site in zip(shares, sites, strict=True)) - product(after, module)


@pytest.mark.parametrize("scheme", [Alternating(), FFA()], ids=lambda scheme: scheme.kind)
@settings(max_examples=60)
@given(cohort=COHORTS)
def test_one_free_factor_averages_exactly(scheme, layouts, draw, product, cohort):
    seed, weights, round = cohort
    _, sites, shares, after = play(scheme, layouts["lora"], draw, seed, weights, round)
    for module in ("q", "v"):
        size = np.linalg.norm(product(after, module))
        assert np.linalg.norm(gap(sites, shares, after, product, module)) <= 1e-6 * size


@settings(max_examples=60)
@given(cohort=COHORTS)
def test_two_free_factors_miss_the_cross_covariance_and_nothing_else(layouts, draw, product, cohort):
    seed, weights, round = cohort
    _, sites, shares, after = play(FedAvg(), layouts["lora"], draw, seed, weights, round)
    for module in ("q", "v"):
        pairs = [(s.named()[f"{module}.lora_B.weight"].astype(float), s.named()[f"{module}.lora_A.weight"].astype(float)) for s in sites]
        mean_b = sum(p * b for p, (b, _) in zip(shares, pairs, strict=True))
        mean_a = sum(p * a for p, (_, a) in zip(shares, pairs, strict=True))
        cross = sum(p * (b - mean_b) @ (a - mean_a) for p, (b, a) in zip(shares, pairs, strict=True))
        missing = gap(sites, shares, after, product, module)
        size = np.linalg.norm(product(after, module))
        assert np.linalg.norm(missing - cross) <= 1e-6 * size
        if len(weights) > 1 and min(shares) > 0.05:
            assert np.linalg.norm(missing) > 1e-4 * size


@pytest.mark.parametrize("scheme", [scheme for scheme in EVERY if scheme.kind != "union"], ids=lambda scheme: scheme.kind)
@settings(max_examples=10)
@given(cohort=COHORTS)
def test_what_is_its_own_factor_averages_exactly_under_every_scheme(scheme, layouts, draw, cohort):
    seed, weights, round = cohort
    for layout in filter(lambda layout: fits(scheme, layout), layouts.values()):
        _, sites, shares, after = play(scheme, layout, draw, seed, weights, round)
        for role in layout.roles & {"head", "bias", "scale", "prompt"} & scheme.phase(round, layout).roles:
            oracle = sum(p * s.pick({role}).flat.astype(np.float64) for p, s in zip(shares, sites, strict=True))
            np.testing.assert_allclose(after.pick({role}).flat, oracle, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scheme", SUMS, ids=lambda scheme: scheme.kind)
def test_through_the_integer_ring_with_drop_outs(scheme, layouts, draw, product):
    for layout in filter(lambda layout: fits(scheme, layout), layouts.values()):
        rng, grid = np.random.default_rng(5), Grid(8, 4.0)
        current, state = draw(layout, rng), {}
        for round in range(1, 5):
            phase = scheme.phase(round, layout)
            total, sites, weights = Update.zero(scheme.travels(layout, phase), grid), [], []
            for weight in rng.choice([0.25, 0.5, 0.75, 1.0], rng.integers(1, 8)):
                site = current.patch((current + draw(layout, rng, 0.1)).pick(phase.trains))
                move = scheme.contribution(current, site, phase, context(scheme, layout, phase, rng, len(sites)))
                total += Update.encode(move, float(weight), {}, grid)
                sites.append(site)
                weights.append(weight)
            after, state = scheme.advance(current, total.mean(), phase, SGD(), state)
            for frozen in layout.roles - phase.moves:
                assert after.pick({frozen}).digest == current.pick({frozen}).digest
            if scheme.exact(layout) and layout is layouts["lora"]:
                missing = gap(sites, np.array(weights) / sum(weights), after, product, "q")
                assert np.linalg.norm(missing) <= 1e-6 * np.linalg.norm(product(after))
            current = after


@pytest.mark.parametrize("made", SERVER_OPTIMIZERS.values(), ids=SERVER_OPTIMIZERS)
@pytest.mark.parametrize("scheme", SUMS, ids=lambda scheme: scheme.kind)
def test_every_server_optimizer_moves_every_scheme(scheme, made, layouts, draw):
    rng, optimizer = np.random.default_rng(2), made()
    for layout in filter(lambda layout: fits(scheme, layout), layouts.values()):
        current, state = draw(layout, rng), {}
        for round in range(1, 6):
            phase = scheme.phase(round, layout)
            mean = draw(scheme.travels(layout, phase), rng, 0.05)
            mean = mean.patch(Tensors(mean.pick({"mass"}).layout, np.abs(mean.pick({"mass"}).flat)))
            after, state = scheme.advance(current, mean, phase, optimizer, state)
            moved = {role for role in layout.roles if after.pick({role}).digest != current.pick({role}).digest}
            assert after.finite
            assert phase.roles & layout.roles <= moved | phase.settles <= phase.moves
            current = after


def test_phases(layouts):
    lora = layouts["lora"]
    assert [Alternating().phase(round, lora).name for round in (1, 2, 3, 4)] == ["B", "A", "B", "A"]
    assert Alternating().phase(1, lora).roles == {"B", "head", "bias"}
    assert Alternating().phase(2, lora).roles == {"A", "head", "bias"}
    assert all(FFA().phase(round, lora).roles == {"B", "head", "bias"} for round in (1, 2))
    assert FedAvg().phase(7, lora).roles == lora.roles
    for name in ("ia3", "bitfit", "prompt", "bottleneck"):
        for made in (Alternating, FFA, FedAvg):
            assert made().phase(2, layouts[name]).roles == made().roles(layouts[name]) == layouts[name].roles
    assert FFA().roles(lora) == lora.roles - {"A"}


LINEAR = {"ia3", "bitfit", "prompt"}


def test_exactness_is_claimed_per_scheme_and_layout(layouts):
    claims = {
        scheme.kind: {name for name, layout in layouts.items() if fits(scheme, layout) and scheme.exact(layout)}
        for scheme in (FedAvg(), Alternating(), FFA())
    }
    assert claims == {"fedavg": LINEAR, "alternating": {"lora", *LINEAR}, "ffa": {"lora", *LINEAR}}
    assert all(scheme.sum_only for scheme in SUMS)
    assert not any(scheme.sum_only for scheme in EVERY if isinstance(scheme, Gathers))
    assert not linear(frozenset({"A", "B"}))


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.kind)
def test_what_moves_and_travels_is_consistent(scheme, layouts):
    taken = [layout for layout in layouts.values() if fits(scheme, layout)]
    assert taken
    for layout in taken:
        for round in range(1, 6):
            phase = scheme.phase(round, layout)
            assert phase.roles & layout.roles
            assert not phase.private & phase.moves
            assert phase.moves & layout.roles <= scheme.roles(layout)
            travels = scheme.travels(layout, phase)
            assert travels.subset(phase.roles) == layout.subset(phase.roles)


def test_a_zero_b_makes_a_round_of_a_pointless_and_it_is_refused(layouts, draw):
    start = draw(layouts["lora"], np.random.default_rng(0))
    fresh = start.patch(Tensors.zeros(layouts["lora"].subset({"B"})))
    scheme = Alternating()
    check_start(fresh, scheme.phase(1, fresh.layout))
    check_start(start, scheme.phase(2, fresh.layout))
    check_start(fresh, FedAvg().phase(1, fresh.layout))
    with pytest.raises(UpdateError, match="start the task with a round of B"):
        check_start(fresh, scheme.phase(2, fresh.layout))


def test_faults_are_named(layouts, draw):
    current, scheme = draw(layouts["lora"], np.random.default_rng(0)), Alternating()
    odd, even = scheme.phase(1, current.layout), scheme.phase(2, current.layout)
    with pytest.raises(UpdateError, match="round 0 does not exist"):
        scheme.phase(0, current.layout)
    with pytest.raises(UpdateError, match=r"the mean holds roles \['A', 'bias', 'head'\], phase 'B'"):
        scheme.advance(current, current.pick(even.roles), odd, SGD(), {})
    broken = current.pick(odd.roles)
    broken.flat[3] = np.nan
    with pytest.raises(UpdateError, match="not finite"):
        scheme.advance(current, broken, odd, SGD(), {})


def test_nothing_is_mutated(layouts, draw):
    rng = np.random.default_rng(1)
    before, after = draw(layouts["lora"], rng), draw(layouts["lora"], rng)
    prints = before.digest, after.digest
    phase = Alternating().phase(1, before.layout)
    mean = Alternating().contribution(before, after, phase, SiteContext(0))
    Alternating().advance(before, mean, phase, SGD(), {})
    assert (before.digest, after.digest) == prints
