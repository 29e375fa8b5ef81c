"""The sketched cross term (ALGORITHMS A3, E.5): exact when wide enough, checked by probes, refused on flat spectra."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, Momentum, SiteContext, Sketch
from fedpeft.schemes.pairing import signs
from fedpeft.schemes.sketch import recover
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update


def dense(tensors, module="layer.0"):
    """All products of a module, summed, in float64."""
    named = {key: value.astype(np.float64) for key, value in tensors.named().items()}
    pairs = [(f"{module}.lora_B{tag}.weight", f"{module}.lora_A{tag}.weight") for tag in ("", "2")]
    return sum(named[b] @ named[a] for b, a in pairs if b in named)


def play(scheme, layout, draw, averaged, seed, count, scale=0.3, grid=None):
    """One round from a random first pair and a second pair of zero; equal weights through ``grid`` where one is given."""
    rng, phase = np.random.default_rng(seed), scheme.phase(1, layout)
    before = draw(layout, rng).patch(Tensors.zeros(layout.subset({"B2"})))
    sites = [before.patch((before + draw(layout, rng, scale)).pick(phase.trains)) for _ in range(count)]
    shares = np.full(count, 1 / count) if grid else rng.dirichlet(np.ones(count))
    moves = [scheme.contribution(before, site, phase, SiteContext(0)) for site in sites]
    total = Update.zero(scheme.travels(layout, phase), grid or Grid(1))
    for move in moves if grid else []:
        total += Update.encode(move, 1.0, {}, grid)
    mean = total.mean() if grid else averaged(moves, shares)
    after, _ = scheme.advance(before, mean, phase, SGD(), {})
    return after, sum(p * dense(site) for p, site in zip(shares, sites, strict=True))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), extra=st.sampled_from([6, 9]))
def test_wide_enough_it_is_exact_with_room_to_fold(square, draw, averaged, seed, count, extra):
    """C has rank at most (sites - 1) r, here 6; twice that keeps the inverse tame for every seed."""
    after, wanted = play(Sketch(width=12), square(24, 20, 2, extra=extra), draw, averaged, seed, count)
    assert np.linalg.norm(dense(after) - wanted) <= 2e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_through_a_24_bit_ring_it_loses_less_than_a_hundred_thousandth(square, draw, averaged, scale):
    """E.5: values of up to 2 in steps of 2^-22."""
    grid = Grid(4, 2.0**6)
    assert grid.step == 2.0**-22
    after, wanted = play(Sketch(width=14), square(48, 40, 3, extra=9), draw, averaged, 3, 4, scale, grid)
    assert np.linalg.norm(dense(after) - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_without_a_second_pair_it_is_the_best_of_rank_r(square, draw, averaged):
    layout = square(16, 18, 3)
    after, wanted = play(Sketch(width=9), layout, draw, averaged, 0, 4)
    singular = np.linalg.svd(wanted)[1]
    assert np.linalg.norm(dense(after) - wanted) <= (1 + 1e-5) * np.linalg.norm(singular[3:])


def test_a_full_fold_keeps_its_best_part(square, draw, averaged):
    layout = square(16, 18, 3, extra=4)
    after, wanted = play(Sketch(width=9), layout, draw, averaged, 0, 4)
    missing = np.linalg.norm(dense(after) - wanted)
    named = {key: value.astype(float) for key, value in after.named().items()}
    first = named["layer.0.lora_B.weight"] @ named["layer.0.lora_A.weight"]
    assert missing == pytest.approx(np.linalg.norm(np.linalg.svd(wanted - first)[1][4:]), rel=1e-3)


def test_too_narrow_for_a_flat_spectrum_it_is_refused_and_averaging_stays(square, draw, averaged):
    layout, scheme = square(64, 64, 4), Sketch(width=3)
    rng, phase = np.random.default_rng(0), scheme.phase(1, layout)
    before = draw(layout, rng)
    sites = [before + draw(layout, rng, 1.0) for _ in range(12)]
    mean = averaged([scheme.contribution(before, site, phase, SiteContext(0)) for site in sites], np.full(12, 1 / 12))
    after, _ = scheme.advance(before, mean, phase, SGD(), {})
    np.testing.assert_array_equal(after.flat, (before + mean.pick(phase.roles)).flat)
    told = scheme.drift(before, mean, phase)
    assert told["recovered"] == 0.0
    assert told["drift"] > 0.3


@pytest.mark.parametrize("width", [6, 12, 18])
def test_four_probes_tell_how_good_the_recovery_is(square, draw, averaged, width):
    """E.5: within 15 % of the true error, over modules, for sketches too narrow by different amounts."""
    layout, scheme = square(200, 80, 4, modules=24), Sketch(width)
    rng, phase, ratios = np.random.default_rng(0), scheme.phase(1, layout), []
    before = draw(layout, rng)
    sites = [before + draw(layout, rng, 0.5 / (1 + i)) for i in range(6)]
    mean = averaged([scheme.contribution(before, site, phase, SiteContext(0)) for site in sites], np.full(6, 1 / 6))
    for pair, (cross, told) in scheme.tried(before, mean, phase).items():
        b, a = ([site.named()[name].astype(np.float64) for site in sites] for name in (pair.b, pair.a))
        c = sum(x @ y for x, y in zip(b, a, strict=True)) / 6 - sum(b) @ sum(a) / 36
        ratios.append(told / np.linalg.norm(c - cross.b @ cross.a) * np.linalg.norm(c))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)
    assert np.std(ratios) < 0.45


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(0, 5), width=st.integers(10, 13))
def test_a_matrix_of_small_rank_comes_back_from_its_sketches(seed, rank, width):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, rank)) @ rng.standard_normal((rank, 30))
    omega, psi = signs(f"o{seed}", (30, width)), signs(f"p{seed}", (width, 20))
    found = recover(x @ omega, psi @ x, psi)
    assert found.b.shape[1] <= width
    np.testing.assert_allclose(found.b @ found.a, x, atol=1e-6 * max(np.linalg.norm(x), 1.0))


def test_moments_go_where_coordinates_go(square, draw, averaged):
    bare, double = square(10, 12, 2), square(10, 12, 2, extra=4)
    for layout, kept in ((bare, False), (double, True)):
        scheme = Sketch(width=6)
        rng, phase = np.random.default_rng(0), scheme.phase(1, layout)
        before = draw(layout, rng)
        moves = [scheme.contribution(before, before + draw(layout, rng, 0.3), phase, SiteContext(0)) for _ in range(3)]
        _, state = scheme.advance(before, averaged(moves, [0.2, 0.3, 0.5]), phase, Momentum(), {})
        assert ("B.m" in state) == kept


def test_what_travels_and_what_is_refused(layouts, square):
    layout = square(10, 12, 2, extra=4)
    scheme = Sketch(width=6, probes=4)
    phase = scheme.phase(1, layout)
    assert phase.roles == {"A", "B"}
    assert phase.settles == {"A2", "B2"}
    assert scheme.travels(layout, phase).size == 2 * (10 + 12) + 6 * (10 + 12) + 4 * 10
    for name in ("ia3", "core"):
        with pytest.raises(UpdateError, match=r"method\.kind"):
            scheme.check(layouts[name])
