"""FedSVD and Fed-SB: re-splitting factors leaves the product where the mean put it (ALGORITHMS E.1, E.14, C.14)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import build
from fedpeft.errors import UpdateError
from fedpeft.schemes import FFA, SCHEMES, SGD, FedSB, FedSVD, Momentum, SiteContext, check_start
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update

SEEDS = st.integers(0, 2**32 - 1)


def dense(tensors, module="layer.0"):
    """B A, or B R A, of a module in float64."""
    named = {key: value.astype(np.float64) for key, value in tensors.named().items()}
    core = named.get(f"{module}.lora_R.weight")
    right = named[f"{module}.lora_A.weight"]
    return named[f"{module}.lora_B.weight"] @ (right if core is None else core @ right)


def cohort(scheme, current, phase, draw, rng, count, scale=0.3):
    sites = [current.patch((current + draw(current.layout, rng, scale)).pick(phase.roles)) for _ in range(count)]
    return sites, [scheme.contribution(current, site, phase, SiteContext(0)) for site in sites]


def core(m, n, r):
    shapes = {"B": (m, r), "R": (r, r), "A": (r, n)}
    return Layout.of([Entry(role, f"layer.0.lora_{role}.weight", shape) for role, shape in shapes.items()])


@settings(max_examples=40)
@given(seed=SEEDS, rank=st.integers(1, 5), count=st.integers(1, 4))
def test_fedsvd_moves_the_product_by_the_mean_and_makes_a_orthonormal(square, draw, averaged, seed, rank, count):
    rng, layout, scheme = np.random.default_rng(seed), square(7, 9, rank), FedSVD()
    current, phase = draw(layout, rng), scheme.phase(1, layout)
    sites, moves = cohort(scheme, current, phase, draw, rng, count)
    shares = rng.dirichlet(np.ones(count))
    after, _ = scheme.advance(current, averaged(moves, shares), phase, SGD(), {})
    wanted = sum(p * dense(site) for p, site in zip(shares, sites, strict=True))
    assert np.linalg.norm(dense(after) - wanted) <= 1e-6 * np.linalg.norm(wanted)
    b, a = (after.named()[f"layer.0.lora_{role}.weight"].astype(np.float64) for role in "BA")
    np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=1e-6)
    lengths = np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(lengths, np.linalg.svd(wanted)[1][:rank], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b.T @ b, np.diag(lengths**2), atol=1e-4 * lengths[0] ** 2)


def test_fedsvd_never_leaves_the_row_space_of_its_start(square, draw, averaged):
    """C.14: as FFA, whatever the sites do; and A goes on being orthonormal."""
    rng, layout, scheme = np.random.default_rng(1), square(12, 20, 4), FedSVD()
    current = draw(layout, rng).patch(Tensors.zeros(layout.subset({"B"})))
    basis = np.linalg.qr(current.named()["layer.0.lora_A.weight"].astype(np.float64).T)[0]
    for round in range(1, 16):
        phase = scheme.phase(round, layout)
        _, moves = cohort(scheme, current, phase, draw, rng, 3)
        current, _ = scheme.advance(current, averaged(moves, [0.5, 0.3, 0.2]), phase, SGD(), {})
        a = current.named()["layer.0.lora_A.weight"].astype(np.float64)
        assert np.linalg.norm(a - a @ basis @ basis.T) < 1e-5
    assert FFA().phase(1, layout).roles == phase.roles


def test_fedsvd_waits_while_b_is_zero_and_keeps_the_row_space_when_rank_falls(square, draw):
    rng, layout, scheme = np.random.default_rng(1), square(6, 8, 3), FedSVD()
    start = draw(layout, rng).patch(Tensors.zeros(layout.subset({"B"})))
    phase = scheme.phase(1, layout)
    still, _ = scheme.advance(start, Tensors.zeros(layout.subset({"B"})), phase, SGD(), {})
    assert still.digest == start.digest
    mean = Tensors.zeros(layout.subset({"B"}))
    mean.named()["layer.0.lora_B.weight"][:, 1] = 1.0
    thin, _ = scheme.advance(start, mean, phase, SGD(), {})
    a = thin.named()["layer.0.lora_A.weight"].astype(np.float64)
    basis = np.linalg.qr(start.named()["layer.0.lora_A.weight"].astype(np.float64).T)[0]
    np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
    assert np.linalg.norm(a - a @ basis @ basis.T) < 1e-5
    assert np.linalg.norm(thin.named()["layer.0.lora_B.weight"][:, 1:]) < 1e-5


def test_momentum_turns_with_the_coordinates(square, draw):
    """Under momentum the product takes the very path of FFA, whose coordinates never turn."""
    rng, layout = np.random.default_rng(4), square(6, 9, 3)
    one = two = draw(layout, rng)
    states = {}, {}
    for round in range(1, 7):
        step = rng.standard_normal((6, 9)) @ np.linalg.pinv(one.named()["layer.0.lora_A.weight"]) @ one.named()["layer.0.lora_A.weight"]
        for which, scheme in enumerate((FFA(), FedSVD())):
            current = (one, two)[which]
            delta = Tensors.zeros(layout.subset({"B"}))
            delta.named()["layer.0.lora_B.weight"][...] = step @ np.linalg.pinv(current.named()["layer.0.lora_A.weight"])
            after, state = scheme.advance(current, delta, scheme.phase(round, layout), Momentum(0.5, 0.9), states[which])
            states = (state, states[1]) if which == 0 else (states[0], state)
            one, two = (after, two) if which == 0 else (one, after)
        np.testing.assert_allclose(dense(one), dense(two), atol=2e-4)


@settings(max_examples=40)
@given(seed=SEEDS, rank=st.integers(1, 5), count=st.integers(1, 4), renew=st.sampled_from([0, 3, 4]))
def test_fedsb_is_exact_in_every_round_and_ends_with_a_core_alone(draw, averaged, seed, rank, count, renew):
    rng, layout, scheme = np.random.default_rng(seed), core(7, 9, rank), FedSB(renew)
    current = Tensors.from_named(
        layout,
        {
            "layer.0.lora_B.weight": np.zeros((7, rank)),
            "layer.0.lora_R.weight": np.eye(rank),
            "layer.0.lora_A.weight": rng.standard_normal((rank, 9)),
        },
    )
    for round in range(1, 10):
        phase = scheme.phase(round, layout)
        check_start(current, phase)
        sites, moves = cohort(scheme, current, phase, draw, rng, count, 1.0)
        shares = rng.dirichlet(np.ones(count))
        after, _ = scheme.advance(current, averaged(moves, shares), phase, SGD(), {})
        wanted = sum(p * dense(site) for p, site in zip(shares, sites, strict=True))
        assert np.linalg.norm(dense(after) - wanted) <= 3e-6 * max(np.linalg.norm(dense(site)) for site in sites)
        for frozen in layout.roles - phase.moves:
            assert after.pick({frozen}).digest == current.pick({frozen}).digest
        named = {role: after.named()[f"layer.0.lora_{role}.weight"].astype(np.float64) for role in "ABR"}
        if phase.name == "B":
            np.testing.assert_allclose(named["B"].T @ named["B"], np.eye(rank), atol=2e-6)
        if phase.name == "A":
            np.testing.assert_allclose(named["A"] @ named["A"].T, np.eye(rank), atol=2e-6)
            np.testing.assert_allclose(named["B"].T @ named["B"], np.eye(rank), atol=2e-6)
            assert np.count_nonzero(named["R"]) <= rank
        current = after


def test_fedsb_phases_and_bytes():
    layout = core(64, 48, 4)
    names = [FedSB().phase(round, layout).name for round in range(1, 7)]
    assert names == ["B", "A", "R", "R", "R", "R"]
    assert [FedSB(3).phase(round, layout).name for round in range(1, 7)] == ["B", "A", "R"] * 2
    assert FedSB(3).phase(3, layout).settles == {"B"}
    assert FedSB().phase(3, layout).settles == frozenset()
    assert FedSB().travels(layout, FedSB().phase(3, layout)).size == 16
    with pytest.raises(ValueError, match="renew must be 0"):
        build(SCHEMES, {"kind": "fedsb", "renew": 2}, "scheme")


def test_fedsb_finds_the_leading_directions_of_the_gradient():
    """Two rounds of sketch on a linear loss are one step of subspace iteration: most of the best rank-r energy."""
    rng, rank = np.random.default_rng(0), 6
    u, v = (np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in (40, 50))
    gradient = (u / np.arange(1, 21)) @ v.T
    layout, scheme = core(40, 50, rank), FedSB()
    current = Tensors.from_named(
        layout,
        {
            "layer.0.lora_B.weight": np.zeros((40, rank)),
            "layer.0.lora_R.weight": np.eye(rank),
            "layer.0.lora_A.weight": rng.standard_normal((rank, 50)),
        },
    )
    for round in (1, 2):
        phase, named = scheme.phase(round, layout), current.named()
        b, a = named["layer.0.lora_B.weight"], named["layer.0.lora_A.weight"]
        step = Tensors.zeros(layout.subset(phase.roles))
        (name,) = step.layout.names
        step.named()[name][...] = gradient @ a.T if round == 1 else 1e3 * b.T @ gradient
        current, _ = scheme.advance(current, step, phase, SGD(), {})
    b, a = (current.named()[f"layer.0.lora_{role}.weight"].astype(np.float64) for role in "BA")
    kept = np.linalg.norm(b.T @ gradient @ a.T) ** 2
    assert kept > 0.9 * np.sum(np.arange(1, rank + 1) ** -2.0)


def test_a_core_never_touched_keeps_its_b_and_the_next_round_is_refused():
    rng, layout, scheme = np.random.default_rng(0), core(5, 6, 2), FedSB()
    start = Tensors(layout, rng.standard_normal(layout.size).astype(np.float32)).patch(Tensors.zeros(layout.subset({"B"})))
    phase = scheme.phase(1, layout)
    after, _ = scheme.advance(start, Tensors.zeros(layout.subset({"B"})), phase, SGD(), {})
    assert after.digest == start.digest
    with pytest.raises(UpdateError, match="B is all zero"):
        check_start(after, scheme.phase(2, layout))


@pytest.mark.parametrize(("scheme", "word"), [(FedSVD(), "lower method.r"), (FedSB(), "lower method.r")], ids=lambda x: str(x)[:6])
def test_ranks_beyond_the_width_are_refused(scheme, word, square):
    with pytest.raises(UpdateError, match=word):
        scheme.check(square(3, 9, 4) if scheme.kind == "fedsvd" else core(3, 9, 4))
    with pytest.raises(UpdateError, match=r"method\.kind"):
        scheme.check(core(5, 5, 2) if scheme.kind == "fedsvd" else square(5, 5, 2))


def test_orientation_on_a_square_that_is_not_symmetric(square, draw):
    """E.13: a transposed product would have the same shape."""
    rng, layout, grid = np.random.default_rng(0), square(768, 768, 4), Grid(2)
    current, phase = draw(layout, rng, 0.05), FedSVD().phase(1, layout)
    sites, moves = cohort(FedSVD(), current, phase, draw, rng, 2, 0.01)
    total = Update.encode(moves[0], 1.0, {}, grid) + Update.encode(moves[1], 1.0, {}, grid)
    after, _ = FedSVD().advance(current, total.mean(), phase, SGD(), {})
    wanted = (dense(sites[0]) + dense(sites[1])) / 2
    assert np.linalg.norm(dense(after) - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert np.linalg.norm(dense(after) - wanted.T) > np.linalg.norm(wanted)
