"""Heterogeneous ranks (ALGORITHMS A4, E.4), against the conventions of the literature written out as references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.schemes import FFA, SGD, Alternating, FedAvg, Masks, SiteContext, Slots
from fedpeft.schemes.slots import UNIT
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update

COHORTS = st.tuples(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4))


def dense(tensors, module="layer.0"):
    named = tensors.named()
    return named[f"{module}.lora_B.weight"].astype(np.float64) @ named[f"{module}.lora_A.weight"].astype(np.float64)


def trained(scheme, before, phase, site, draw, rng, scale=0.3):
    """What a site holds after training its coordinates only."""
    mask = scheme.mask(before.layout, phase, site)
    step = draw(before.layout.subset(phase.trains), rng, scale)
    if mask is not None:
        step.flat[~mask] = 0.0
    return before.patch(before.pick(phase.trains) + step)


def play(scheme, layout, draw, averaged, cohort):
    seed, ranks, round = cohort
    rng = np.random.default_rng(seed)
    before, phase = draw(layout, rng), scheme.phase(round, layout)
    places = [SiteContext(seed % 1000, f"site-{i}", rank) for i, rank in enumerate(ranks)]
    sites = [trained(scheme, before, phase, place, draw, rng) for place in places]
    shares = rng.dirichlet(np.ones(len(ranks)))
    moves = [scheme.contribution(before, site, phase, place) for site, place in zip(sites, places, strict=True)]
    after, _ = scheme.advance(before, averaged(moves, shares), phase, SGD(), {})
    return before, places, sites, shares, after, phase


@pytest.mark.parametrize("pick", ["random", "prefix"])
@pytest.mark.parametrize("factors", ["alternating", "ffa"])
@settings(max_examples=30)
@given(cohort=COHORTS)
def test_ranks_of_any_mixture_average_exactly(pick, factors, square, draw, averaged, cohort):
    scheme, layout = Slots(pick, "delta", factors), square(6, 8, 4, modules=2)
    _, _, sites, shares, after, _ = play(scheme, layout, draw, averaged, cohort)
    assert scheme.exact(layout)
    for module in ("layer.0", "layer.1"):
        wanted = sum(p * dense(site, module) for p, site in zip(shares, sites, strict=True))
        assert np.linalg.norm(dense(after, module) - wanted) <= 2e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("average", ["delta", "mass"])
@pytest.mark.parametrize("factors", ["alternating", "both", "ffa"])
@settings(max_examples=25)
@given(cohort=COHORTS)
def test_each_slot_moves_by_the_mean_over_all_or_over_those_that_trained_it(average, factors, square, draw, averaged, cohort):
    scheme, layout = Slots("random", average, factors), square(6, 8, 4)
    before, places, sites, shares, after, phase = play(scheme, layout, draw, averaged, cohort)
    for role in phase.roles:
        name = f"layer.0.lora_{role}.weight"
        axis = 0 if role == "A" else 1
        for slot in range(4):
            old, new = (np.take(x.named()[name], slot, axis) for x in (before, after))
            deltas = [np.take(site.named()[name].astype(np.float64), slot, axis) - old for site in sites]
            held = [scheme.chosen(4, place)[slot] for place in places]
            assert all(mine or not delta.any() for mine, delta in zip(held, deltas, strict=True))
            mass = sum(p for p, mine in zip(shares, held, strict=True) if mine)
            wanted = sum(p * delta for p, delta in zip(shares, deltas, strict=True))
            if mass == 0:
                assert np.array_equal(old, new)
            else:
                np.testing.assert_allclose(new - old, wanted / mass if average == "mass" else wanted, atol=3e-6)


@settings(max_examples=25)
@given(cohort=COHORTS)
def test_a_site_with_no_delta_changes_only_the_normalisation(square, draw, averaged, cohort):
    """E.4."""
    seed, ranks, round = cohort
    rng, scheme, layout = np.random.default_rng(seed), Slots(), square(6, 8, 4)
    before, phase = draw(layout, rng), scheme.phase(round, layout)
    places = [SiteContext(1, f"site-{i}", rank) for i, rank in enumerate(ranks)]
    moves = [scheme.contribution(before, trained(scheme, before, phase, p, draw, rng), phase, p) for p in places]
    idle = scheme.contribution(before, before, phase, SiteContext(1, "idle", 2))
    shares = rng.dirichlet(np.ones(len(moves) + 1))
    without, _ = scheme.advance(before, averaged(moves, shares[:-1] / shares[:-1].sum()), phase, SGD(), {})
    beside, _ = scheme.advance(before, averaged([*moves, idle], shares), phase, SGD(), {})
    np.testing.assert_allclose(dense(beside) - dense(before), (1 - shares[-1]) * (dense(without) - dense(before)), atol=1e-5)


@pytest.mark.parametrize("average", ["delta", "mass"])
def test_untrained_slots_keep_their_bits_through_the_ring(average, square, draw):
    rng, layout, grid = np.random.default_rng(0), square(6, 8, 5), Grid(8)
    scheme = Slots("prefix", average, "both")
    before, phase = draw(layout, rng), scheme.phase(1, layout)
    before.flat[::7] = -0.0
    total = Update.zero(scheme.travels(layout, phase), grid)
    for index, weight in enumerate((0.3, 0.8, 1.0)):
        place = SiteContext(0, str(index), 1 + index)
        site = trained(scheme, before, phase, place, draw, rng, 0.1)
        total += Update.encode(scheme.contribution(before, site, phase, place), weight, {}, grid)
    mean = total.mean()
    held = [0.3, 0.8, 1.0]
    exact = [sum(round(w * 2**20) / 2**20 for w in held[i:]) for i in range(3)] + [0.0, 0.0]
    np.testing.assert_allclose(mean.named()["mass/5"] / UNIT, np.array(exact) / total.weight, rtol=1e-6, atol=0)
    after, _ = scheme.advance(before, mean, phase, SGD(), {})
    for role, axis in (("A", 0), ("B", 1)):
        old, new = (np.moveaxis(x.named()[f"layer.0.lora_{role}.weight"], axis, 0) for x in (before, after))
        assert old[3:].tobytes() == new[3:].tobytes()
        assert (old[:3] != new[:3]).any(axis=1).all()


def test_picks(layouts, square):
    layout = square(6, 8, 8)
    prefix, random = Slots("prefix"), Slots()
    assert prefix.chosen(8, SiteContext(0, "a", 3)).tolist() == [True] * 3 + [False] * 5
    assert random.chosen(8, SiteContext(0, "a", 3)).sum() == 3
    seen = sum(random.chosen(8, SiteContext(seed, "a", 2)).astype(int) for seed in range(400))
    assert seen.min() > 60
    assert len({random.chosen(8, SiteContext(0, name, 3)).tobytes() for name in "abcdefgh"}) > 3
    phase = random.phase(1, layout)
    assert random.mask(layout, phase, SiteContext(0)) is None
    assert random.mask(layout, phase, SiteContext(0, "a", 8)) is None
    assert isinstance(random, Masks)
    lora = layouts["lora"]
    odd = prefix.phase(1, lora)
    mask = Tensors(lora.subset(odd.trains), prefix.mask(lora, odd, SiteContext(0, "a", 2)).astype(np.float32))
    assert {name: value.mean() for name, value in mask.named().items() if "lora_B" in name} == {
        "q.lora_B.weight": pytest.approx(2 / 3),
        "v.lora_B.weight": 1.0,
    }
    assert prefix.mask(lora, Slots("prefix", factors="both").phase(1, lora), SiteContext(0, "a", 1)).size == lora.size


def test_a_full_cohort_is_the_plain_scheme(square, draw, averaged):
    for factors, plain in (("alternating", Alternating()), ("both", FedAvg()), ("ffa", FFA())):
        for average in ("delta", "mass"):
            scheme, layout = Slots("random", average, factors), square(5, 7, 3)
            before, _, sites, shares, after, phase = play(scheme, layout, draw, averaged, (3, [9, 9], 2))
            moves = [plain.contribution(before, site, phase, SiteContext(0)).pick(phase.roles) for site in sites]
            wanted, _ = plain.advance(before, averaged(moves, shares), phase, SGD(), {})
            np.testing.assert_allclose(after.flat, wanted.flat, atol=1e-6)


def conventions(factors, shares):
    """Aggregates of factors of rank r_i in the literature's conventions, as dense products of the global rank (float64).

    ``zero-pad`` averages values padded with zeros (as HetLoRA's code does), ``slot-mean`` averages each slot over its holders (RBLA),
    ``corrected`` divides one factor's padded mean by the mass.
    """
    top = max(b.shape[1] for b, _ in factors)
    b = sum(p * np.pad(x, ((0, 0), (0, top - x.shape[1]))) for p, (x, _) in zip(shares, factors, strict=True))
    a = sum(p * np.pad(y, ((0, top - len(y)), (0, 0))) for p, (_, y) in zip(shares, factors, strict=True))
    mass = sum(p * (np.arange(top) < len(y)) for p, (_, y) in zip(shares, factors, strict=True))
    return {"zero-pad": b @ a, "slot-mean": (b / mass) @ (a / mass[:, None]), "corrected": (b / mass) @ a}


def test_zero_padding_weighs_slots_by_the_square_of_their_mass(square, draw, averaged):
    """C.14 and table A4: the conventions' distance from the mean of products, for ranks 4 to 16 and a small drift."""
    rng, m, n, ranks = np.random.default_rng(0), 64, 48, [4, 4, 8, 8, 16, 16]
    shares, b, a = np.full(6, 1 / 6), rng.standard_normal((m, 16)), rng.standard_normal((16, n))
    factors = [((b + 0.05 * rng.standard_normal(b.shape))[:, :r], (a + 0.05 * rng.standard_normal(a.shape))[:r]) for r in ranks]
    wanted = sum(p * x @ y for p, (x, y) in zip(shares, factors, strict=True))
    off = {name: np.linalg.norm(got - wanted) / np.linalg.norm(wanted) for name, got in conventions(factors, shares).items()}
    assert off["corrected"] < 0.01 < 0.2 < off["zero-pad"] < off["slot-mean"]
    layout = square(m, n, 16)
    for round in (1, 2):
        _, _, sites, part, after, _ = play(Slots(), layout, draw, averaged, (0, ranks, round))
        wanted = sum(p * dense(site) for p, site in zip(part, sites, strict=True))
        assert np.linalg.norm(dense(after) - wanted) < 1e-6 * np.linalg.norm(wanted)
