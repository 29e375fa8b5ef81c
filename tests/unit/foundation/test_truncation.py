"""The best product of rank r, against the dense SVD in float64: every way within 1e-6 of ||M|| of the optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.factors import truncate
from fedpeft.factors.krylov import by_krylov
from fedpeft.factors.products import stack

WAYS = ["qr", "gram", "krylov", "auto"]
M, N, R = 96, 120, 8


def cohort(rng, sites, drift, m=M, n=N):
    """What sites send that started from one adapter: its factors plus drift of their own."""
    b, a, scale = rng.standard_normal((m, R)), rng.standard_normal((R, n)), np.logspace(0, -1, R)
    moved = [(b + drift * rng.standard_normal(b.shape), a + drift * rng.standard_normal(a.shape)) for _ in range(sites)]
    return [((b * scale / sites).astype(np.float32), a.astype(np.float32)) for b, a in moved]


def spectrum(rng, values):
    u, v = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in (M, N))
    return [((u * values).astype(np.float32), v.T.astype(np.float32))]


CASES = {
    "cohort": lambda rng: cohort(rng, 30, 0.3),
    "far apart": lambda rng: cohort(rng, 10, 3.0),
    "flat": lambda rng: spectrum(rng, np.ones(90)),
    "slow": lambda rng: spectrum(rng, np.arange(1, 91.0) ** -0.5),
    "steep": lambda rng: spectrum(rng, np.arange(1, 91.0) ** -4),
    "step behind the rank": lambda rng: spectrum(rng, np.where(np.arange(90) < R, 1.0, 1e-3)),
    "step before the rank": lambda rng: spectrum(rng, np.where(np.arange(90) < R - 2, 1.0, 1e-3)),
    "rank below r": lambda rng: cohort(rng, 40, 0.0),
    "rank one": lambda rng: spectrum(rng, np.ones(1)) * 30,
    "shared A": lambda rng: [(rng.standard_normal((M, R)).astype(np.float32), shared_a(R)) for _ in range(30)],
    "tall": lambda rng: cohort(rng, 20, 0.3, m=300, n=10),
    "wide": lambda rng: cohort(rng, 20, 0.3, m=6, n=200),
}


def shared_a(rank):
    return np.random.default_rng(9).standard_normal((rank, N)).astype(np.float32)


def oracle(terms, rank):
    whole = sum(b.astype(np.float64) @ a.astype(np.float64) for b, a in terms)
    values = np.linalg.svd(whole, compute_uv=False)
    return whole, np.linalg.norm(values[rank:]), np.linalg.norm(values)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_error_is_within_a_millionth_of_the_optimum(case, how):
    terms = CASES[case](np.random.default_rng(7))
    whole, optimum, size = oracle(terms, R)
    b, a, lost = truncate(terms, R, how=how)
    assert (b.dtype, a.dtype, b.shape, a.shape) == (np.float32, np.float32, (len(whole), R), (R, whole.shape[1]))
    assert np.linalg.norm(whole - b.astype(np.float64) @ a.astype(np.float64)) - optimum <= 1e-6 * size
    share = (optimum / size) ** 2
    assert lost == pytest.approx(share, rel=0.5, abs=1e-11) if how in ("krylov", "auto") else lost == pytest.approx(share, abs=1e-12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    rank=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    how=st.sampled_from(WAYS),
)
def test_any_shape_and_rank(seed, ranks, rank, sizes, how):
    rng, (m, n) = np.random.default_rng(seed), sizes
    terms = [(rng.standard_normal((m, r)), rng.standard_normal((r, n))) for r in ranks]
    whole, optimum, size = oracle(terms, rank)
    b, a, lost = truncate(terms, rank, how=how)
    assert np.linalg.norm(whole - b @ a) - optimum <= 1e-6 * size
    assert 0.0 <= lost <= 1.0
    if sum(ranks) <= rank:
        assert lost <= 1e-12


@pytest.mark.parametrize("how", WAYS)
def test_the_two_splits(how):
    terms = cohort(np.random.default_rng(1), 30, 0.3)
    balanced, left = truncate(terms, R, how=how), truncate(terms, R, how=how, split="left")
    np.testing.assert_allclose(balanced.b @ balanced.a, left.b @ left.a, atol=2e-5)
    np.testing.assert_allclose(left.a @ left.a.T, np.eye(R), atol=2e-6)
    gram_b, gram_a = balanced.b.T @ balanced.b, balanced.a @ balanced.a.T
    np.testing.assert_allclose(gram_b, np.diag(np.diag(gram_b)), atol=1e-5 * gram_b[0, 0])
    np.testing.assert_allclose(gram_b, gram_a, atol=1e-5 * gram_b[0, 0])
    assert (np.diff(np.diag(gram_b)) <= 0).all()
    assert (balanced.b.max(axis=0) >= -balanced.b.min(axis=0)).all()


def test_what_is_not_there_is_zero():
    (b, a), rng = cohort(np.random.default_rng(0), 1, 0.0)[0], np.random.default_rng(2)
    b, a = b[:, :3], a[:3]
    found = truncate([(b, a), (rng.standard_normal((M, 2)).astype(np.float32) * 1e-12, np.ones((2, N), np.float32))], R)
    assert not found.b[:, 3:].any()
    assert not found.a[3:].any()
    assert np.abs(found.b[:, :3]).min(axis=1).any()
    for how in WAYS:
        nothing = truncate([(np.zeros((M, 3)), np.zeros((3, N)))], 2, how=how)
        assert (nothing.b.any(), nothing.a.any(), nothing.lost) == (False, False, 0.0)


def test_a_start_near_the_answer_saves_blocks(monkeypatch):
    blocks = []
    ritz = by_krylov.__globals__["_ritz"]
    monkeypatch.setitem(by_krylov.__globals__, "_ritz", lambda image: blocks.append(image.shape[1]) or ritz(image))
    terms = cohort(np.random.default_rng(3), 50, 1.0)
    cold = truncate(terms, R, how="krylov")
    count = len(blocks)
    warm = truncate(terms, R, how="krylov", start=cold.a)
    assert len(blocks) - count < count
    whole, optimum, size = oracle(terms, R)
    assert np.linalg.norm(whole - warm.b.astype(np.float64) @ warm.a.astype(np.float64)) - optimum <= 1e-6 * size


def test_a_spectrum_too_flat_for_the_iteration_goes_to_the_gram_matrices(monkeypatch):
    monkeypatch.setitem(by_krylov.__globals__, "STEPS", 2)
    terms = CASES["slow"](np.random.default_rng(0))
    assert by_krylov(stack(terms), 4) is None
    assert (truncate(terms, 4, how="krylov").b == truncate(terms, 4, how="gram").b).all()


def test_equal_inputs_give_equal_bits_and_stay_as_they_were():
    terms = cohort(np.random.default_rng(5), 30, 0.5)
    copies = [(b.copy(), a.copy()) for b, a in terms]
    one, two = truncate(terms, R), truncate(terms, R)
    assert (one.b == two.b).all()
    assert (one.a == two.a).all()
    assert all((b == x).all() and (a == y).all() for (b, a), (x, y) in zip(terms, copies, strict=True))


def test_faults_are_named():
    terms = cohort(np.random.default_rng(5), 3, 0.5)
    with pytest.raises(AdapterError, match="rank 0 does not exist"):
        truncate(terms, 0)
    terms[1][0][3, 2] = np.nan
    with pytest.raises(AdapterError, match="not finite"):
        truncate(terms, 2)
    with pytest.raises(AdapterError, match="nothing to add"):
        truncate([], 2)
