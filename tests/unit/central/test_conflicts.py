"""PCGrad from inner products against the algorithm on vectors; lanes of a shared adapter against each task alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.central.conflicts import Conflicts, cosines, projected
from fedpeft.central.world import World


def vectors(seed, tasks, size=7):
    return np.random.default_rng(seed).normal(size=(tasks, size)) * np.random.default_rng(seed + 1).uniform(0.1, 9, (tasks, 1))


def on_vectors(grads, orders):
    """Algorithm 1 of the paper, vector by vector."""
    total = np.zeros(grads.shape[1])
    for task, order in enumerate(orders):
        own = grads[task].copy()
        for other in order:
            if other != task and own @ grads[other] < 0:
                own -= own @ grads[other] / (grads[other] @ grads[other]) * grads[other]
        total += own
    return total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 5))
def test_pcgrad_on_inner_products_is_pcgrad_on_vectors(seed, tasks):
    grads = vectors(seed, tasks)
    orders = [np.random.default_rng([seed, task]).permutation(tasks).tolist() for task in range(tasks)]
    found = projected(grads @ grads.T, orders) @ grads
    np.testing.assert_allclose(found, on_vectors(grads, orders), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_of_two_tasks_none_is_opposed(seed):
    grads = vectors(seed, 2)
    found = projected(grads @ grads.T, [[0, 1], [1, 0]]) @ grads
    assert (grads @ found >= -1e-9 * np.abs(grads).max() ** 2).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 5))
def test_orthogonal_and_aligned_gradients_are_summed(seed, tasks):
    orthogonal = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, tasks)))[0].T * 3.0
    aligned = np.abs(vectors(seed, tasks))
    orders = [list(range(tasks))] * tasks
    for grads, exact in ((aligned, True), (orthogonal, False)):
        coefficients = projected(grads @ grads.T, orders)
        assert not exact or (coefficients == 1.0).all()
        np.testing.assert_allclose(coefficients @ grads, grads.sum(0), rtol=1e-9, atol=1e-9)


def test_cosines_of_nothing_are_nothing():
    grads = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(cosines(grads @ grads.T), [[1, -1, 0], [-1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("handling", ["report", "pcgrad"])
def test_gradients_that_overflow_have_no_cosines_and_leave_no_trace(handling):
    sinks = torch.tensor([[torch.inf, 1.0], [1.0, -torch.inf]])
    live = SimpleNamespace(split=lambda: sinks, pool=SimpleNamespace(names=("a", "b")))
    conflicts = Conflicts(live, handling, World(), 0)
    conflicts.settle(None, 0)
    assert conflicts.cosines == {}
    assert not sinks.any()
