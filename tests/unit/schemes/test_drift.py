"""Drift telemetry against the dense cross term, and FedRot, which makes that term small."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, FedAvg, FedRot, Reports, SiteContext, Slots
from fedpeft.schemes.fedrot import rotation
from fedpeft.schemes.pairing import signs
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update


def dense(tensors, module="layer.0"):
    named = tensors.named()
    return named[f"{module}.lora_B.weight"].astype(np.float64) @ named[f"{module}.lora_A.weight"].astype(np.float64)


def truth(before, sites, shares, modules):
    """||C|| / ||U|| over all modules, from dense float64 products."""
    lost = whole = 0.0
    for module in modules:
        named = [{key: value.astype(np.float64) for key, value in site.named().items()} for site in sites]
        target = sum(p * dense(site, module) for p, site in zip(shares, sites, strict=True))
        b, a = (sum(p * n[f"{module}.lora_{r}.weight"] for p, n in zip(shares, named, strict=True)) for r in "BA")
        lost += np.linalg.norm(target - b @ a) ** 2
        whole += np.linalg.norm(target - dense(before, module)) ** 2
    return np.sqrt(lost / whole)


def turned(tensors, rng):
    """The same products in other coordinates."""
    out = Tensors(tensors.layout, tensors.flat.copy())
    for module in {entry.name.split(".lora")[0] for entry in tensors.layout.entries}:
        b, a = (out.named()[f"{module}.lora_{role}.weight"] for role in "BA")
        q = np.linalg.qr(rng.standard_normal((len(a), len(a))))[0]
        b[...], a[...] = b @ q, q.T @ a
    return out


TALL = 300
"""More rows than a probe has, so that they are summed with signs."""


@pytest.mark.parametrize(
    ("scheme", "rows"), [(FedAvg(4), 24), (FedAvg(4), TALL), (FedRot(rotate=0.0), 24), (Slots(factors="both"), 24)], ids=str
)
def test_four_probes_tell_the_drift(scheme, rows, square, draw, averaged):
    layout, modules = square(rows, 32, 4, modules=12), [f"layer.{i}" for i in range(12)]
    phase, off = scheme.phase(1, layout), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        before, shares = draw(layout, rng), rng.dirichlet(np.ones(5))
        sites = [before + draw(layout, rng, 0.5) for _ in shares]
        moves = [scheme.contribution(before, site, phase, SiteContext(seed)) for site in sites]
        told = scheme.drift(before, averaged(moves, shares), phase)["drift"]
        off.append(told / truth(before, sites, shares, modules) - 1.0)
    assert np.std(off) < 0.06
    assert abs(np.mean(off)) < 3 * np.std(off) / np.sqrt(len(off)) + 0.002


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5))
def test_one_site_or_equal_sites_do_not_drift(square, draw, averaged, seed, count):
    rng, layout, scheme = np.random.default_rng(seed), square(6, 8, 2, modules=2), FedAvg(4)
    before, phase = draw(layout, rng), scheme.phase(1, layout)
    after = before + draw(layout, rng, 0.3)
    moves = [scheme.contribution(before, after, phase, SiteContext(i, str(i))) for i in range(count)]
    assert scheme.drift(before, averaged(moves, rng.dirichlet(np.ones(count))), phase)["drift"] < 1e-5


def test_probes_survive_the_ring_and_leave_the_step_alone(square, draw):
    rng, layout, scheme = np.random.default_rng(0), square(16, 12, 3, modules=3), FedAvg(4)
    before, phase, grid = draw(layout, rng), scheme.phase(1, layout), Grid(4)
    sites = [before + draw(layout, rng, 0.2) for _ in range(4)]
    total, bare = Update.zero(scheme.travels(layout, phase), grid), Update.zero(layout, grid)
    for site in sites:
        total += Update.encode(scheme.contribution(before, site, phase, SiteContext(0)), 0.5, {}, grid)
        bare += Update.encode(FedAvg(0).contribution(before, site, phase, SiteContext(0)), 0.5, {}, grid)
    told = scheme.drift(before, total.mean(), phase)["drift"]
    assert told == pytest.approx(truth(before, sites, [0.25] * 4, [f"layer.{i}" for i in range(3)]), rel=0.3)
    one, two = scheme.advance(before, total.mean(), phase, SGD(), {})[0], FedAvg(0).advance(before, bare.mean(), phase, SGD(), {})[0]
    assert one.digest == two.digest


def test_what_the_probes_cost_and_when_there_are_none(layouts, square, draw):
    layout = square(16, 12, 3, modules=3)
    assert FedAvg(4).travels(layout, FedAvg(4).phase(1, layout)).size == layout.size + 3 * 16 * 4
    assert FedAvg(4).travels(square(TALL, 12, 3), FedAvg(4).phase(1, square(TALL, 12, 3))).size == 3 * (TALL + 12) + 64 * 4
    assert FedAvg(0).travels(layout, FedAvg(0).phase(1, layout)) == layout
    for other in (layouts["ia3"], layouts["bottleneck"], layouts["core"]):
        phase = FedAvg(4).phase(1, other)
        assert FedAvg(4).travels(other, phase) == other
        assert FedAvg(4).drift(draw(other, np.random.default_rng(0)), Tensors.zeros(other), phase) == {}
    still = Tensors.zeros(FedAvg(4).travels(layout, FedAvg(4).phase(1, layout)))
    assert FedAvg(4).drift(draw(layout, np.random.default_rng(0)), still, FedAvg(4).phase(1, layout)) == {}
    assert all(isinstance(scheme, Reports) for scheme in (FedAvg(), FedRot(), Slots()))


def test_public_signs_are_the_same_everywhere_and_balanced():
    assert signs("a", (2, 8)).tolist() == [[1, -1, -1, -1, -1, 1, 1, -1], [-1, 1, 1, 1, 1, 1, 1, -1]]  # SHAKE256("a") starts 86 7e
    many = signs("b", (400, 300))
    assert set(np.unique(many)) == {-1.0, 1.0}
    assert abs(many.mean()) < 0.02
    assert not np.array_equal(signs("a", (64,)), signs("b", (64,)))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 6), share=st.floats(0.0, 1.0))
def test_rotations_are_orthogonal_and_the_whole_one_is_the_nearest(seed, rank, share):
    rng = np.random.default_rng(seed)
    fit = rng.standard_normal((rank, rank))
    turn = rotation(fit, share)
    np.testing.assert_allclose(turn @ turn.T, np.eye(rank), atol=1e-9)
    if 0.0 < share < 1.0:
        assert np.linalg.det(turn) > 0
    best = np.trace(fit.T @ rotation(fit))
    assert best == pytest.approx(np.linalg.svd(fit)[1].sum())
    assert all(np.trace(fit.T @ np.linalg.qr(rng.standard_normal((rank, rank)))[0]) <= best + 1e-9 for _ in range(20))
    assert np.array_equal(rotation(np.zeros((rank, rank)), share), np.eye(rank))


@pytest.mark.parametrize("round", [1, 2])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), rotate=st.floats(0.0, 1.0))
def test_fedrot_sends_the_same_product_in_nearer_coordinates(square, draw, seed, rotate, round):
    rng, layout, scheme = np.random.default_rng(seed), square(6, 9, 3, modules=2), FedRot(rotate)
    before, phase = draw(layout, rng), scheme.phase(round, layout)
    site = turned(before + draw(layout, rng, 0.1), rng)
    sent = before + scheme.contribution(before, site, phase, SiteContext(0)).pick(layout.roles)
    for module in ("layer.0", "layer.1"):
        np.testing.assert_allclose(dense(sent, module), dense(site, module), atol=2e-5)
    role = "A" if round == 1 else "B"
    apart = [np.linalg.norm(x.pick({role}).flat - before.pick({role}).flat) for x in (sent, site)]
    if rotate == 1.0:
        assert apart[0] <= apart[1] + 1e-4


@pytest.mark.parametrize("round", [1, 2])
def test_turned_sites_destroy_plain_averaging_and_not_fedrot(square, draw, averaged, round):
    rng, layout = np.random.default_rng(0), square(16, 20, 4)
    before = draw(layout, rng)
    sites, shares = [turned(before + draw(layout, rng, 0.05), rng) for _ in range(6)], np.full(6, 1 / 6)
    wanted = sum(p * dense(site) for p, site in zip(shares, sites, strict=True))
    off, drift = {}, {}
    for name, scheme in (("plain", FedAvg(4)), ("hard", FedRot(1.0)), ("soft", FedRot(0.5))):
        phase = scheme.phase(round, layout)
        mean = averaged([scheme.contribution(before, site, phase, SiteContext(0)) for site in sites], shares)
        after, _ = scheme.advance(before, mean, phase, SGD(), {})
        off[name] = np.linalg.norm(dense(after) - wanted) / np.linalg.norm(wanted)
        drift[name] = scheme.drift(before, mean, phase)["drift"]
    assert off["hard"] < 0.01 < 0.3 < off["plain"]
    assert off["soft"] < off["plain"]
    assert drift["hard"] < 0.5 < drift["plain"]


def test_fedrot_names_the_factor_and_refuses_what_has_none(layouts):
    assert [FedRot().phase(round, layouts["lora"]).name for round in (1, 2, 3)] == ["align A", "align B", "align A"]
    assert not FedRot().exact(layouts["lora"])
    for name in ("ia3", "core", "bottleneck"):
        with pytest.raises(UpdateError, match=r"method\.kind"):
            FedRot().check(layouts[name])
