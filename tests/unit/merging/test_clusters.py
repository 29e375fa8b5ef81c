"""Cosines of adapters in product space, and the clusters that they show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.merging.clusters import clusters, cosines
from fedpeft.tensors import Entry, Layout, Tensors


def layout(rank: int) -> Layout:
    return Layout.of([Entry("A", f"{m}.lora_A", (rank, 7)) for m in "qv"] + [Entry("B", f"{m}.lora_B", (6, rank)) for m in "qv"])


def drawn(rng: np.random.Generator, rank: int) -> Tensors:
    return Tensors(layout(rank), rng.normal(size=layout(rank).size).astype(np.float32))


def dense(tensors: Tensors) -> np.ndarray:
    named = {name: value.astype(np.float64) for name, value in tensors.named().items()}
    return np.concatenate([(named[f"{m}.lora_B"] @ named[f"{m}.lora_A"]).ravel() for m in "qv"])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_cosines_are_those_of_the_dense_products(seed: int, ranks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    adapters = [drawn(rng, rank) for rank in ranks]
    flat = np.stack([dense(tensors) for tensors in adapters])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(adapters), flat @ flat.T, atol=1e-6)


def test_an_adapter_that_does_nothing_is_like_no_other() -> None:
    one = drawn(np.random.default_rng(0), 2)
    table = cosines([one, Tensors.zeros(layout(2))])
    assert table[0, 1] == table[1, 0] == table[1, 1] == 0.0


def test_other_targets_cannot_be_compared() -> None:
    half = Layout.of([Entry("A", "q.lora_A", (2, 7)), Entry("B", "q.lora_B", (6, 2))])
    with pytest.raises(AdapterError, match="same modules"):
        cosines([drawn(np.random.default_rng(0), 2), Tensors.zeros(half)])
    with pytest.raises(AdapterError, match="low-rank factors"):
        cosines([Tensors.zeros(Layout.of([Entry("bias", "q.bias", (3,))]))])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(2, 4), min_size=2, max_size=3))
def test_planted_clusters_are_found_in_any_order(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    truth = [label for label, size in enumerate(sizes) for _ in range(size)]
    centres = np.linalg.qr(rng.normal(size=(40, len(sizes))))[0].T
    points = np.stack([centres[label] + 0.03 * rng.normal(size=40) for label in truth])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    order = rng.permutation(len(truth))
    found = clusters(points[order] @ points[order].T)
    first = list(dict.fromkeys(truth[place] for place in order))
    assert found == tuple(first.index(truth[place]) for place in order)


def test_tasks_without_structure_stay_together() -> None:
    assert clusters(np.eye(5)) == (0,) * 5
    assert clusters(np.ones((4, 4))) == (0,) * 4
    assert clusters(np.ones((1, 1))) == (0,)
