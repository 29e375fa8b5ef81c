"""The accountants' answers against published tables, their own test values, and formulas that are known in closed form."""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError
from fedpeft.privacy.accounting import Event, calibrate, epsilon, sum_of_discrete

ROUNDS = (1, 10, 100, 1000, 10**4, 10**5, 10**6)
TABLE = [
    (10**5, 10**2, 1.0, (0.97, 0.98, 1.00, 1.07, 1.18, 2.21, 7.50)),
    (10**6, 10**3, 1.0, (1.17, 1.17, 1.20, 1.28, 1.39, 2.44, 8.13)),
    (10**6, 10**4, 1.0, (1.73, 1.92, 2.08, 3.06, 8.49, 32.38, 187.01)),
    (10**6, 10**3, 3.0, (0.47, 0.47, 0.48, 0.48, 0.49, 0.67, 1.95)),
    (10**9, 10**3, 1.0, (0.84, 0.84, 0.84, 0.85, 0.88, 0.88, 0.88)),
]
"""McMahan et al. 2018 (arXiv 1710.06963), table 1: users, sample, noise, epsilons after `ROUNDS` at delta = users^-1.1."""


@lru_cache
def curve(noise: float, rate: float) -> tuple[tuple[int, float], ...]:
    """Orders and Rényi divergences of one round, from the accountant."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(range(2, 34)))
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
    return tuple(zip(accountant._orders, accountant._rdp, strict=True))


def moments(noise: float, rate: float, rounds: int, delta: float) -> float:
    """The paper's conversion (Abadi et al. 2016) of the Rényi accountant's curve, at whole orders up to 33."""
    return min(rounds * divergence + log(1 / delta) / (order - 1) for order, divergence in curve(noise, rate))


def gaussian_delta(noise: float, target: float) -> float:
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8."""

    def tail(value: float) -> float:
        return 0.5 * erfc(value / sqrt(2))

    return tail(target * noise - 0.5 / noise) - exp(target) * tail(target * noise + 0.5 / noise)


@pytest.mark.parametrize(("users", "sample", "noise", "published"), TABLE)
def test_the_table_of_dp_fedavg(users, sample, noise, published):
    for rounds, known in zip(ROUNDS, published, strict=True):
        assert moments(noise, sample / users, rounds, users**-1.1) == pytest.approx(known, rel=0.01, abs=0.006)
    assert 0 < epsilon([Event(noise, sample / users, 1000)], users**-1.1) <= published[3] + 0.006


@pytest.mark.parametrize(("users", "published"), [(763430, 4.634), (10**8, 1.152)])
def test_the_language_model_of_dp_fedavg(users, published):
    assert moments(1.0, 5000 / users, 5000, 1e-9) == pytest.approx(published, rel=1e-3)
    assert epsilon([Event(1.0, 5000 / users, 5000)], 1e-9) < published


@pytest.mark.parametrize(
    ("events", "delta", "known"),
    [
        ([Event(sqrt(3)), Event(sqrt(3), count=2)], 0.126936, 1.0),
        ([Event(0.5, 0.2), Event(0.5, 0.2, 2)], 0.15594, 1.0),
    ],
)
def test_the_accountants_own_values(events, delta, known):
    assert epsilon(events, delta) == pytest.approx(known, rel=0.01)


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (5.0, 1), (5.0, 30), (20.0, 100)])
def test_gaussians_without_sampling_cost_what_theory_says(noise, count):
    found = epsilon([Event(noise, count=count)], 1e-5)
    assert gaussian_delta(noise / sqrt(count), found) == pytest.approx(1e-5, rel=0.02)
    assert found < epsilon([Event(noise, count=count, concentrated=True)], 1e-5) < 1.25 * found


def test_concentrated_events_cost_at_most_the_textbook_conversion():
    rho = 30 / (2 * 25.0)
    assert epsilon([Event(5.0, count=30, concentrated=True)], 1e-5) < rho + 2 * sqrt(rho * log(1e5))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([2.0, 3.0, 7.5]), st.sampled_from([0.1, 1.0]), st.integers(1, 5)), min_size=1, max_size=4))
def test_more_releases_never_cost_less_and_order_does_not_matter(table):
    events = [Event(*row) for row in table]
    whole = epsilon(events, 1e-5)
    assert epsilon(events[::-1], 1e-5) == whole
    assert epsilon(events[1:], 1e-5) <= whole
    assert epsilon([event for event in events for event in [Event(event.noise, event.rate)] * event.count], 1e-5) == whole


@pytest.mark.parametrize(
    "release",
    [
        lambda z: [Event(z, count=30)],
        lambda z: [Event(z, count=30), Event(4 * z, count=30)],
        lambda z: [Event(z, count=30, concentrated=True)],
    ],
)
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_calibrated_noise_spends_the_budget_and_no_more(release, target):
    noise = calibrate(release, target, 1e-5)
    assert epsilon(release(noise), 1e-5) <= target
    assert epsilon(release(noise * 0.995), 1e-5) > target


def test_calibration_counts_sampling():
    noise = calibrate(lambda z: [Event(z, 0.05, 20)], 2.0, 1e-5)
    assert epsilon([Event(noise, 0.05, 20)], 1e-5) <= 2.0 < epsilon([Event(noise * 0.995, 0.05, 20)], 1e-5)


def test_nothing_released_costs_nothing():
    assert epsilon([], 1e-5) == 0.0


def test_hardly_any_noise_is_said_to_be_hardly_any():
    assert epsilon([Event(0.05)], 1e-5) > 100


def test_sums_of_discrete_gaussians_are_as_good_as_their_variance_on_a_fine_grid():
    assert sum_of_discrete(2.0, 6.0, 1000, 10**7) == pytest.approx(2.0, rel=1e-12)
    coarse = [sum_of_discrete(2.0, deviation, 100, 10**4) for deviation in (0.5, 1.0, 2.0, 4.0)]
    assert coarse == sorted(coarse)
    assert coarse[0] < 0.1
    assert sum_of_discrete(2.0, 0.5, 1, 10**4) == pytest.approx(2.0)
    with pytest.raises(PrivacyError, match="finer grid"):
        sum_of_discrete(2.0, 0.4, 10, 10)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Event(0.0), "noise"),
        (lambda: Event(float("nan")), "noise"),
        (lambda: Event(float("inf")), "noise"),
        (lambda: Event(1.0, 0.0), "rate"),
        (lambda: Event(1.0, 1.5), "rate"),
        (lambda: Event(1.0, count=0), "count"),
        (lambda: Event(1.0, 0.5, concentrated=True), "sampling"),
        (lambda: epsilon([Event(1.0)], 0.0), "delta"),
        (lambda: epsilon([Event(1.0)], 1.0), "delta"),
        (lambda: calibrate(lambda z: [Event(z)], 0.0, 1e-5), "epsilon"),
        (lambda: calibrate(lambda z: [Event(z), Event(1.0)], 1.0, 1e-5), "no noise"),
        (lambda: Event.from_json({"noise": 1.0}), "missing"),
        (lambda: Event.from_json({**Event(1.0).to_json(), "more": 1}), "more"),
        (lambda: Event.from_json({**Event(1.0).to_json(), "noise": "1"}), "noise"),
        (lambda: Event.from_json({**Event(1.0).to_json(), "count": True}), "count"),
    ],
)
def test_what_cannot_be_accounted_is_refused_by_name(make, word):
    with pytest.raises(PrivacyError, match=word):
        make()


def test_events_survive_json():
    event = Event(1.25, 0.5, 3)
    assert Event.from_json(event.to_json()) == event


@pytest.mark.parametrize("sites", [1, 2, 5, 12])
@pytest.mark.parametrize("deviation", [0.5, 0.6, 0.8, 1.5])
def test_no_divergence_of_a_sum_of_discrete_gaussians_is_above_the_bound(sites, deviation):
    reach = int(40 * deviation)
    single = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    total = np.ones(1)
    for _ in range(sites):
        total = np.convolve(total, single / single.sum())
    for shift in (1, 2):
        worth = sum_of_discrete(deviation * sqrt(sites) / shift, deviation, sites, 1)
        left, right = total[shift:], total[:-shift]
        sound = (left > 1e-280) & (right > 1e-280)
        for order in (1.5, 2.0, 4.0, 8.0):
            powers = order * np.log(left[sound]) + (1 - order) * np.log(right[sound])
            divergence = np.log(np.exp(powers).sum()) / (order - 1)
            assert divergence <= order / (2 * worth**2) * (1 + 1e-9) + 1e-12
            if deviation >= 1.5:
                assert divergence == pytest.approx(order / (2 * worth**2), rel=0.02)
