"""ALGORITHMS E.9: prototypes belong to the product and not to its factors; gates do not shout; the stacked mixture is the loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.factors import Product
from fedpeft.routing.prototypes import arrow, arrow_scores, gate_scores, mix, spectrum, spectrum_scores, top

SEEDS = st.integers(0, 2**32 - 1)


def draw(rng, m, r, n):
    return Product(rng.standard_normal((m, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32))


@settings(max_examples=50)
@given(seed=SEEDS, m=st.integers(4, 12), n=st.integers(4, 12), r=st.integers(1, 4))
def test_arrow_is_the_products_and_knows_no_gauge(seed, m, n, r):
    rng = np.random.default_rng(seed)
    product = draw(rng, m, r, n)
    dense = product.b.astype(float) @ product.a.astype(float)
    _, sizes, right = np.linalg.svd(dense)
    vector = arrow(product)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    if len(sizes) == 1 or sizes[1] < 0.9 * sizes[0]:
        assert abs(right[0] @ vector) == pytest.approx(1.0, abs=1e-4)
        gauge = np.eye(r) + 0.3 * rng.standard_normal((r, r)) / r
        turned = Product((product.b @ np.linalg.inv(gauge)).astype(np.float32), (gauge @ product.a).astype(np.float32))
        assert np.allclose(arrow(turned), vector, atol=1e-3)
        assert np.allclose(arrow(Product(-product.b, product.a)), vector, atol=1e-5)


@settings(max_examples=30)
@given(seed=SEEDS)
def test_spectr_measures_what_the_adapter_does_to_the_row(seed):
    rng = np.random.default_rng(seed)
    experts, x = [draw(rng, 7, r, 9) for r in (1, 2, 3)], rng.standard_normal((5, 9)).astype(np.float32)
    scores = spectrum_scores([spectrum(expert) for expert in experts], x)
    oracle = [[np.linalg.norm(e.b.astype(float) @ e.a @ row) for e in experts] for row in x]
    assert np.allclose(scores, oracle, rtol=1e-4)


@settings(max_examples=30)
@given(seed=SEEDS, scale=st.floats(0.01, 100.0))
def test_a_loud_gate_wins_nothing(seed, scale):
    rng = np.random.default_rng(seed)
    gates, x = (rng.standard_normal((count, 16)).astype(np.float32) for count in (3, 4))
    loud = gates * np.array([[scale], [1.0], [1.0]], np.float32)
    assert np.allclose(gate_scores(loud, x), gate_scores(gates, x), atol=1e-3)
    assert not np.allclose(arrow_scores(gates * np.float32(10), x), arrow_scores(gates, x))


@settings(max_examples=30)
@given(seed=SEEDS, k=st.integers(1, 4))
def test_the_stacked_mixture_is_the_loop_over_experts(seed, k):
    rng = np.random.default_rng(seed)
    experts, x = [draw(rng, 6, r, 8) for r in (1, 2, 2, 5)], rng.standard_normal((7, 8)).astype(np.float32)
    weights = top(rng.standard_normal((7, 4)).astype(np.float32), k)
    assert np.allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    assert (np.count_nonzero(weights, axis=1) <= k).all()
    loop = sum(weights[:, e : e + 1].astype(float) * (x @ expert.a.T.astype(float) @ expert.b.T) for e, expert in enumerate(experts))
    assert np.abs(mix(experts, weights, x) - loop).max() <= 1e-5 * max(1.0, np.abs(loop).max())


def test_a_zero_adapter_has_no_direction():
    with pytest.raises(AdapterError, match="zero"):
        arrow((np.zeros((3, 2), np.float32), np.ones((2, 4), np.float32)))
