"""Product space through the factors, against dense products in float64 (ALGORITHMS E.10)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.factors import Product, difference, gram, inner, norm, pairs, products, scaled, stack
from fedpeft.tensors import Entry, Layout, Tensors

SEEDS = st.integers(0, 2**32 - 1)
RANKS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def draw(rng, rank, m=7, n=4, dtype=np.float32):
    return Product(rng.standard_normal((m, rank)).astype(dtype), rng.standard_normal((rank, n)).astype(dtype))


def dense(x):
    return x[0].astype(np.float64) @ x[1].astype(np.float64)


@settings(max_examples=50)
@given(seed=SEEDS, ranks=RANKS)
def test_gram_inner_and_norm_are_those_of_the_dense_products(seed, ranks):
    rng = np.random.default_rng(seed)
    xs = [draw(rng, rank) for rank in ranks]
    flat = np.stack([dense(x).ravel() for x in xs])
    size = np.abs(flat).sum() ** 2
    np.testing.assert_allclose(gram(xs), flat @ flat.T, rtol=0, atol=1e-13 * size)
    assert (gram(xs) == gram(xs).T).all()
    assert inner(xs[0], xs[-1]) == pytest.approx(flat[0] @ flat[-1], abs=1e-13 * size)
    assert norm(xs[0]) == pytest.approx(np.linalg.norm(flat[0]), rel=1e-12)


@settings(max_examples=50)
@given(seed=SEEDS, ranks=RANKS, factor=st.floats(-3, 3, width=16))
def test_stacking_adds(seed, ranks, factor):
    rng = np.random.default_rng(seed)
    xs = [draw(rng, rank, dtype=np.float64) for rank in ranks]
    np.testing.assert_allclose(dense(stack(xs)), sum(map(dense, xs)), atol=1e-12)
    np.testing.assert_allclose(dense(difference(xs[0], xs[-1])), dense(xs[0]) - dense(xs[-1]), atol=1e-12)
    np.testing.assert_allclose(dense(scaled(xs[0], factor)), factor * dense(xs[0]), atol=1e-12)
    assert stack(xs).b.shape[1] == sum(ranks)


def test_the_gauge_of_the_factors_does_not_matter():
    rng = np.random.default_rng(3)
    x, turn = draw(rng, 3, dtype=np.float64), rng.standard_normal((3, 3))
    y = Product(x.b @ turn, np.linalg.solve(turn, x.a))
    assert norm(difference(x, y)) <= 1e-6 * norm(x)
    assert np.linalg.norm(x.b - y.b) > 0.1


def test_pairs_name_what_multiplies_and_products_are_views():
    layout = Layout.of(
        [
            Entry("A", "x.q.lora_A.weight", (2, 4)),
            Entry("B", "x.q.lora_B.weight", (3, 2)),
            Entry("A2", "x.q.lora_A2.weight", (5, 4)),
            Entry("B2", "x.q.lora_B2.weight", (3, 5)),
            Entry("head", "score", (2, 3)),
        ]
    )
    tensors = Tensors.zeros(layout)
    (pair, product), *rest = products(tensors).items()
    assert not rest
    assert (pair.b, pair.a) == ("x.q.lora_B.weight", "x.q.lora_A.weight")
    product.b[...] = 1.0
    assert tensors.named()[pair.b].sum() == 6
    assert [p.b for p in pairs(layout, ("B2", "A2"))] == ["x.q.lora_B2.weight"]
    assert pairs(layout, ("up", "down")) == ()


def test_what_does_not_fit_is_refused():
    with pytest.raises(AdapterError, match=r"different modules: \['y'\]"):
        pairs(Layout.of([Entry("B", "y", (2, 2))]))
    with pytest.raises(AdapterError, match="no factors"):
        pairs(Layout.of([Entry("B", "q.lora_B", (3, 2)), Entry("A", "q.lora_A", (1, 4))]))
    rng = np.random.default_rng(0)
    with pytest.raises(AdapterError, match="of one module"):
        gram([draw(rng, 2), draw(rng, 2, m=8)])
    with pytest.raises(AdapterError, match="nothing to add"):
        stack([])
