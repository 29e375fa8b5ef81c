"""Rules of balancing against what they say, written out plainly; and when tasks stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import build
from fedpeft.training import stopping
from fedpeft.training.balancing import BALANCES, CoBa, Temperature, Uncertainty, among

LOSSES = st.floats(0.01, 20.0)
CURVES = st.integers(1, 5).flatmap(lambda tasks: st.lists(st.lists(LOSSES, min_size=tasks, max_size=tasks), min_size=1, max_size=9))


def fed(rule, curves, sizes=None):
    """The state after as many steps and looks as there are ``curves``."""
    state = rule.start(np.arange(1.0, len(curves[0]) + 1) if sizes is None else np.array(sizes, float))
    for losses in curves:
        state = rule.look(rule.learn(state, np.array(losses)), np.array(losses))
    return state


@settings(max_examples=40, deadline=None)
@given(curves=CURVES, kind=st.sampled_from(sorted(BALANCES)), data=st.data())
def test_weights_sum_to_the_number_of_tasks_that_are_there(curves, kind, data):
    rule = build(BALANCES, kind, "balance")
    weights = rule.weights(fed(rule, curves))
    tasks = len(curves[0])
    assert weights.shape == (tasks,)
    assert (weights > 0).all()
    assert math.isclose(weights.sum(), tasks, rel_tol=1e-9)
    there = np.array(data.draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks)))
    kept = among(weights, there)
    assert (kept[~there] == 0).all()
    assert math.isclose(kept.sum(), there.sum(), rel_tol=1e-9)
    if there.any():
        np.testing.assert_allclose(kept[there] / kept[there][0], weights[there] / weights[there][0], rtol=1e-9)


def slope(curve):
    """Of the least-squares line, by the textbook."""
    n, xs = len(curve), range(len(curve))
    mx, my = sum(xs) / n, sum(curve) / n
    return sum((x - mx) * (y - my) for x, y in zip(xs, curve, strict=True)) / sum((x - mx) ** 2 for x in xs)


def softmax(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def coba_weights(curves, history, warmup, tau):
    """Of tasks' held-out losses (look by look), section 3 of the paper, one equation after the other."""
    tasks, looks = len(curves[0]), len(curves)
    if looks < warmup:
        return [1.0] * tasks
    ratios = [[row[t] / curves[0][t] for row in curves] for t in range(tasks)]
    slopes = [[slope(ratios[t][max(0, end - history) : end]) for end in range(2, looks + 1)] for t in range(tasks)]
    now = [own[-1] for own in slopes]
    whole = sum(map(abs, now))
    relative = softmax([tasks * a / whole if whole else 0.0 for a in now])
    lasts = [own[-history:] for own in slopes]
    absolute = softmax([-len(own) * own[-1] / sum(map(abs, own)) if any(own) else 0.0 for own in lasts])
    worst = [max(own[i] for own in slopes) for i in range(looks - 1)]
    felt = sum(map(abs, worst))
    divergence = min(1.0, len(worst) * softmax([-tau * len(worst) * a / felt if felt else 0.0 for a in worst])[-1])
    return [tasks * (divergence * r + (1 - divergence) * a) for r, a in zip(relative, absolute, strict=True)]


@settings(max_examples=60, deadline=None)
@given(curves=CURVES, history=st.integers(2, 5), warmup=st.integers(2, 4), tau=st.floats(0.5, 8.0))
def test_coba_is_its_equations(curves, history, warmup, tau):
    rule = CoBa(history, warmup, tau)
    np.testing.assert_allclose(rule.weights(fed(rule, curves)), coba_weights(curves, history, warmup, tau), rtol=1e-6, atol=1e-9)


def test_coba_favours_the_slow_and_then_what_does_not_diverge():
    falling = [[5 * 0.7**t, 5 * 0.98**t] for t in range(6)]
    fast, slow = CoBa().weights(fed(CoBa(), falling))
    assert slow > fast
    turning = [*falling, *([1.0, 6.0 + t] for t in range(6))]
    steady, diverging = CoBa().weights(fed(CoBa(), turning))
    assert steady > diverging


@settings(max_examples=25, deadline=None)
@given(curves=CURVES, rate=st.floats(0.001, 0.5))
def test_uncertainty_is_adam_on_kendalls_objective(curves, rate):
    torch = pytest.importorskip("torch")
    s = torch.zeros(len(curves[0]), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=rate)
    for losses in curves:
        adam.zero_grad()
        (torch.exp(-s) * torch.tensor(losses, dtype=torch.float64) + s / 2).sum().backward()
        adam.step()
    state = fed(Uncertainty(rate), curves)
    np.testing.assert_allclose(state["log_variance"], s.detach().numpy(), rtol=1e-7, atol=1e-9)
    want = np.exp(-s.detach().numpy())
    np.testing.assert_allclose(Uncertainty(rate).weights(state), len(want) * want / want.sum(), rtol=1e-6)


def test_uncertainty_forgets_nothing_of_a_task_that_rests():
    rule = Uncertainty(0.1)
    state = rule.start(np.ones(2))
    for losses in ([1.0, 3.0], [2.0, np.nan], [1.5, np.nan]):
        state = rule.learn(state, np.array(losses))
    once = rule.learn(rule.start(np.ones(2)), np.array([1.0, 3.0]))
    assert all(state[name][1] == once[name][1] for name in once)
    assert (state["log_variance"][0], state["steps"][0]) != (once["log_variance"][0], once["steps"][0])


def test_temperature_goes_from_examples_alike_to_tasks_alike():
    sizes = [10, 30, 60]
    np.testing.assert_allclose(Temperature(1.0).weights(fed(Temperature(1.0), [[1.0] * 3], sizes)), [0.3, 0.9, 1.8])
    np.testing.assert_allclose(Temperature(1e9).weights(fed(Temperature(1e9), [[1.0] * 3], sizes)), [1.0] * 3, rtol=1e-6)


def test_a_task_ends_after_its_patience_and_stays_ended():
    state, ends = stopping.start(2), []
    for look, losses in enumerate([[1.0, 1.0], [0.99, 0.5], [1.0, 0.6], [0.2, 0.7], [0.1, 0.1]]):
        state = stopping.looked(state, np.array(losses), 10 * look, 2, 0.05)
        ends.append([int(end) if end != stopping.GOING else None for end in state["ended"]])
    assert ends == [[None, None], [None, None], [20, None], [20, 30], [20, 30]]
