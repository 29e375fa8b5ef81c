"""RoAd in Cartesian coordinates (TAXONOMY 4.1, class T) and sparse deltas by union."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, Cartesian, FedAvg, SiteContext, Union
from fedpeft.schemes.union import largest
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update

SEEDS = st.integers(0, 2**32 - 1)


def plane(tensors):
    """(alpha cos theta, alpha sin theta) in float64: the weights are linear in them."""
    alpha, theta = (tensors.pick({role}).flat.astype(np.float64) for role in ("alpha", "theta"))
    return np.stack([alpha * np.cos(theta), alpha * np.sin(theta)])


@settings(max_examples=60)
@given(seed=SEEDS, count=st.integers(1, 5), spread=st.floats(0.01, 4.0))
def test_rotations_with_scale_average_exactly(layouts, draw, averaged, seed, count, spread):
    rng, layout, scheme = np.random.default_rng(seed), layouts["road"], Cartesian()
    before, phase = draw(layout, rng), scheme.phase(1, layout)
    sites, shares = [before + draw(layout, rng, spread) for _ in range(count)], rng.dirichlet(np.ones(count))
    moves = [scheme.contribution(before, site, phase, SiteContext(0)) for site in sites]
    after, _ = scheme.advance(before, averaged(moves, shares), phase, SGD(), {})
    wanted = sum(p * plane(site) for p, site in zip(shares, sites, strict=True))
    np.testing.assert_allclose(plane(after), wanted, atol=5e-6 * (1 + spread))
    for role in ("head", "bias"):
        mean = sum(p * site.pick({role}).flat.astype(float) for p, site in zip(shares, sites, strict=True))
        np.testing.assert_allclose(after.pick({role}).flat, mean, atol=1e-5)
    assert scheme.exact(layout)
    assert not FedAvg().exact(layout)


@settings(max_examples=30)
@given(seed=SEEDS)
def test_one_site_comes_back_as_it_is_and_the_unmoved_keeps_its_bits(layouts, draw, averaged, seed):
    """A scale keeps its sign and an angle its turns, so a site finds its own coordinates again."""
    rng, layout, scheme = np.random.default_rng(seed), layouts["road"], Cartesian()
    before, phase = draw(layout, rng, 5.0), scheme.phase(1, layout)
    alpha = before.named()["k.road_alpha"]
    alpha[...] = np.sign(alpha) * (1.0 + np.abs(alpha))
    step = draw(layout, rng, 0.05)
    for name in ("k.road_alpha", "k.road_theta"):
        step.named()[name][:2] = 0.0
    after, _ = scheme.advance(before, scheme.contribution(before, before + step, phase, SiteContext(0)), phase, SGD(), {})
    np.testing.assert_allclose(after.flat, (before + step).flat, atol=1e-4)
    for name in ("k.road_alpha", "k.road_theta"):
        assert after.named()[name][:2].tobytes() == before.named()[name][:2].tobytes()


def test_the_weights_are_peft_s(draw):
    """The mean of the sites' dense matrices, as peft builds them for each variant, is that of the averaged adapter."""
    import torch
    from peft.tuners.road.layer import _get_delta_weight

    for variant, size in (("road_1", 4), ("road_2", 8), ("road_4", 16)):
        layout, rng, scheme = (
            Layout.of([Entry(role, f"k.road_{role}", (size,)) for role in ("alpha", "theta")]),
            np.random.default_rng(1),
            Cartesian(),
        )
        before, phase = draw(layout, rng), scheme.phase(1, layout)
        sites = [before + draw(layout, rng, 0.5) for _ in range(3)]
        total = Update.zero(layout, Grid(3, 8.0))
        for site in sites:
            total += Update.encode(scheme.contribution(before, site, phase, SiteContext(0)), 1.0, {}, Grid(3, 8.0))
        after, _ = scheme.advance(before, total.mean(), phase, SGD(), {})

        def weight(tensors, variant=variant):
            values = [torch.from_numpy(tensors.named()[f"k.road_{name}"].copy()) for name in ("theta", "alpha")]
            return _get_delta_weight(variant, 8, *values).numpy()

        np.testing.assert_allclose(weight(after), sum(map(weight, sites)) / 3, atol=1e-6)
        plain, _ = FedAvg().advance(before, Tensors(layout, sum(s.flat for s in sites) / np.float32(3) - before.flat), phase, SGD(), {})
        assert np.abs(weight(plain) - sum(map(weight, sites)) / 3).max() > 0.05


def test_methods_without_a_chart_are_refused(layouts):
    for name in ("lora", "ia3"):
        with pytest.raises(UpdateError, match=r'method\.kind = "road"'):
            Cartesian().check(layouts[name])


@settings(max_examples=60)
@given(values=st.lists(st.integers(-4, 4), min_size=1, max_size=30), share=st.floats(0.01, 1.0))
def test_the_largest_share_is_kept_and_never_a_zero(values, share):
    array = np.array(values, np.float32)
    kept = largest(array, share)
    assert kept.sum() == min(int(np.ceil(share * len(values))), np.count_nonzero(array))
    if kept.any() and not kept.all():
        assert np.abs(array[kept]).min() >= np.abs(array[~kept]).max()


@pytest.mark.parametrize("denominator", ["global", "local"])
@settings(max_examples=30)
@given(seed=SEEDS, count=st.integers(1, 5), share=st.sampled_from([0.05, 0.3, 1.0]))
def test_the_union_moves_by_the_mean_of_what_was_kept(layouts, draw, denominator, seed, count, share):
    """Against a loop over coordinates; through the ring, with the weights that it rounds."""
    rng, scheme, grid = np.random.default_rng(seed), Union(share, denominator), Grid(8, 4.0)
    for layout in (layouts["ia3"], layouts["lora"]):
        before, phase = draw(layout, rng), scheme.phase(1, layout)
        sites, weights = [before + draw(layout, rng, 0.2) for _ in range(count)], rng.choice([0.25, 0.5, 1.0], count)
        total = Update.zero(scheme.travels(layout, phase), grid)
        for site, weight in zip(sites, weights, strict=True):
            total += Update.encode(scheme.contribution(before, site, phase, SiteContext(0)), float(weight), {}, grid)
        after, _ = scheme.advance(before, total.mean(), phase, SGD(), {})
        for entry in layout.entries:
            old, new = (x.named()[entry.name].ravel() for x in (before, after))
            deltas = [site.named()[entry.name].ravel() - old for site in sites]
            count_kept = int(np.ceil((1.0 if entry.role == "head" else share) * entry.size))
            marks = [np.isin(range(entry.size), np.argsort(-np.abs(delta), kind="stable")[:count_kept]) for delta in deltas]
            for i in range(entry.size):
                held = [w for w, mark in zip(weights, marks, strict=True) if mark[i]]
                sent = sum(w * delta[i] for w, delta, mark in zip(weights, deltas, marks, strict=True) if mark[i])
                divisor = sum(held) if denominator == "local" and entry.role != "head" else sum(weights)
                assert new[i] - old[i] == pytest.approx(sent / divisor if held else 0.0, abs=3e-6)


def test_union_says_when_it_is_exact_and_what_it_sends(layouts):
    lora = layouts["lora"]
    phase = Union().phase(1, lora)
    heads = lora.subset({"head"}).size
    assert Union(0.1, "global").travels(lora, phase) == lora
    assert Union(0.1, "local").travels(lora, phase).size == 2 * lora.size - heads
    assert Union(1.0, "global", "alternating").exact(lora)
    assert not any(scheme.exact(layouts["ia3"]) for scheme in (Union(), Union(0.5, "global"), Union(1.0, "local")))
