"""The effective norm of a factor's step, and its way back."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.errors import PrivacyError
from fedpeft.privacy.metric import Metric
from fedpeft.tensors import Entry, Layout, Tensors

LAYOUT = Layout.of(
    [
        Entry("A", "q.lora_A.weight", (4, 30)),
        Entry("B", "q.lora_B.weight", (20, 4)),
        Entry("A", "v.lora_A.weight", (4, 10)),
        Entry("B", "v.lora_B.weight", (50, 4)),
        Entry("head", "score.weight", (3, 20)),
    ]
)


def tensors(seed: int, layout: Layout = LAYOUT) -> Tensors:
    return Tensors(layout, np.random.default_rng(seed).normal(size=layout.size).astype(np.float32))


@pytest.mark.parametrize("role", ["A", "B"])
def test_the_norm_is_that_of_the_change_of_the_weights(role):
    current = tensors(0)
    delta = tensors(1).pick({role, "head"})
    named, steps = current.named(), delta.named()
    whole = [steps["score.weight"]]
    for module in "qv":
        b, a = f"{module}.lora_B.weight", f"{module}.lora_A.weight"
        whole.append(steps[b] @ named[a] if role == "B" else named[b] @ steps[a])
    expected = np.sqrt(sum(float((part.astype(np.float64) ** 2).sum()) for part in whole))
    metric = Metric.of(current, frozenset({role, "head"}))
    assert metric.into(delta).norm() == pytest.approx(expected, rel=1e-6)
    assert metric.back(metric.into(delta)).flat == pytest.approx(delta.flat, abs=1e-5)
    assert np.array_equal(metric.into(delta).named()["score.weight"], steps["score.weight"])


def test_an_orthonormal_factor_changes_nothing():
    current = tensors(0)
    for name, view in current.named().items():
        if "lora_A" in name:
            view[...] = np.linalg.qr(view.T)[0].T
    delta = tensors(1).pick({"B"})
    assert Metric.of(current, frozenset({"B"})).into(delta).flat == pytest.approx(delta.flat, abs=1e-5)


@pytest.mark.parametrize("spoil", [lambda a: a * 0, lambda a: np.repeat(a[:1], 4, axis=0)])
def test_factors_without_full_rank_stay_invertible(spoil):
    current = tensors(0)
    for name, view in current.named().items():
        if "lora_A" in name:
            view[...] = spoil(view)
    metric, delta = Metric.of(current, frozenset({"B"})), tensors(1).pick({"B"})
    assert metric.back(metric.into(delta)).flat == pytest.approx(delta.flat, abs=1e-3)


def test_methods_without_factors_keep_their_metric():
    layout = Layout.of([Entry("scale", "q.ia3_l", (7,))])
    delta = tensors(1, layout)
    assert np.array_equal(Metric.of(tensors(0, layout), frozenset({"scale"})).into(delta).flat, delta.flat)


def test_two_moving_factors_have_no_such_metric():
    with pytest.raises(PrivacyError, match="both move"):
        Metric.of(tensors(0), frozenset({"A", "B"}))
