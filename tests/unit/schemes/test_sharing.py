"""Laws of shared factors: weights, the common step, and taking a group's factor over."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import Sharing, realign
from fedpeft.tensors import Entry, Layout, Tensors

ROWS = st.dictionaries(st.sampled_from("abcdef"), st.floats(1, 1e6), min_size=1)
LAYOUT = Layout.of([Entry("A", "q.lora_A", (2, 6)), Entry("B", "q.lora_B", (5, 2)), Entry("head", "w", (3,))])


def drawn(seed: int, layout: Layout = LAYOUT) -> Tensors:
    return Tensors(layout, np.random.default_rng(seed).normal(size=layout.size).astype(np.float32))


def product(tensors: Tensors) -> np.ndarray:
    named = tensors.named()
    return named["q.lora_B"].astype(np.float64) @ named["q.lora_A"].astype(np.float64)


@given(rows=ROWS, temperature=st.sampled_from([1.0, 2.0, 5.0, inf]))
def test_weights_sum_to_one_and_flatten_with_temperature(rows: dict[str, float], temperature: float) -> None:
    shares = Sharing(temperature=temperature).weights(rows)
    assert sum(shares.values()) == pytest.approx(1.0)
    proportional = {task: count / sum(rows.values()) for task, count in rows.items()}
    if temperature == 1.0:
        assert shares == pytest.approx(proportional)
    if temperature == inf:
        assert shares == pytest.approx({task: 1 / len(rows) for task in rows})
    assert max(shares.values()) <= max(proportional.values()) * (1 + 1e-9)


def test_a_task_without_rows_has_no_weight() -> None:
    with pytest.raises(UpdateError, match="rows of the tasks"):
        Sharing().weights({"a": 1.0, "b": 0.0})


@settings(max_examples=30)
@given(rows=ROWS, temperature=st.sampled_from([1.0, 2.0, inf]), share=st.sampled_from(["A", "B", "both"]))
def test_the_common_step_is_the_weighted_mean_of_what_is_shared(rows: dict[str, float], temperature: float, share: str) -> None:
    sharing = Sharing(share, temperature)  # type: ignore[arg-type]
    means = {task: drawn(ord(task)) for task in rows}
    shares = sharing.weights(rows)
    oracle = sum(shares[task] * means[task].pick(sharing.roles).flat.astype(np.float64) for task in sorted(rows))
    step = sharing.joint(means, rows)
    assert step.layout.roles == sharing.roles
    np.testing.assert_allclose(step.flat, oracle, rtol=1e-6, atol=1e-7)


def test_with_temperature_one_tasks_do_not_matter() -> None:
    """Every row counts alike: one task of all sites, or two of some, take the same step (sites of 3, 5 and 4 rows)."""
    sites = {"x": (3.0, drawn(1)), "y": (5.0, drawn(2)), "z": (4.0, drawn(3))}

    def mean(*names: str) -> tuple[Tensors, float]:
        total = sum(sites[name][0] for name in names)
        flat = sum(sites[name][0] / total * sites[name][1].flat.astype(np.float64) for name in names)
        return Tensors(LAYOUT, np.asarray(flat, np.float32)), total

    (one, n), (left, p), (right, q) = mean("x", "y", "z"), mean("x"), mean("y", "z")
    sharing = Sharing(temperature=1.0)
    np.testing.assert_allclose(
        sharing.joint({"t": one}, {"t": n}).flat, sharing.joint({"l": left, "r": right}, {"l": p, "r": q}).flat, rtol=1e-5, atol=1e-6
    )


def test_tasks_of_other_shapes_share_nothing() -> None:
    other = Layout.of([Entry("A", "q.lora_A", (3, 6)), Entry("B", "q.lora_B", (5, 3))])
    with pytest.raises(UpdateError, match="different shapes"):
        Sharing().joint({"a": drawn(1), "b": drawn(2, other)}, {"a": 1.0, "b": 1.0})


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), share=st.sampled_from(["A", "B"]))
def test_a_change_of_gauge_is_repaired_exactly(seed: int, share: str) -> None:
    stale, gauge = drawn(seed), np.random.default_rng(seed).normal(size=(2, 2)) + 3 * np.eye(2)
    named = {name: value.copy() for name, value in stale.named().items()}
    named["q.lora_A"], named["q.lora_B"] = (gauge @ named["q.lora_A"]), named["q.lora_B"] @ np.linalg.inv(gauge)
    turned = Tensors.from_named(LAYOUT, named)
    whole, lost = realign(stale, turned.pick({share}))
    assert lost < 1e-4
    np.testing.assert_allclose(product(whole), product(stale), atol=1e-3)
    assert np.array_equal(whole.pick({share}).flat, turned.pick({share}).flat)
    assert np.array_equal(whole.pick({"head"}).flat, stale.pick({"head"}).flat)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_the_loss_is_the_least_possible(seed: int) -> None:
    """Against least squares on the dense product."""
    stale, shared = drawn(seed), drawn(seed + 1).pick({"A"})
    whole, lost = realign(stale, shared)
    a = shared.flat.reshape(2, 6).astype(np.float64)
    best, *_ = np.linalg.lstsq(a.T, product(stale).T, rcond=None)
    oracle = np.linalg.norm(best.T @ a - product(stale)) / np.linalg.norm(product(stale))
    assert lost == pytest.approx(oracle, rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(product(whole), best.T @ a, rtol=1e-3, atol=1e-4)


def test_nothing_is_lost_by_a_zero_product_or_where_all_is_shared() -> None:
    fresh = drawn(1).patch(Tensors.zeros(LAYOUT.subset({"B"})))
    whole, lost = realign(fresh, drawn(2).pick({"A"}))
    assert lost == 0.0
    assert not whole.pick({"B"}).flat.any()
    both = drawn(3).pick({"A", "B"})
    whole, lost = realign(drawn(1), both)
    assert lost == 0.0
    assert np.array_equal(whole.pick({"A", "B"}).flat, both.flat)
