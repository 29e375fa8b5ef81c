"""The table of privacy becomes noise and mechanisms, or is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy.accounting import Event, epsilon
from fedpeft.privacy.settings import (
    PRIVACY,
    Central,
    Cohort,
    Distributed,
    Example,
    check_phase,
    make_privacy,
    noise_for,
    of_adapter,
    of_evaluation,
    steps_noise,
)

# settings


def test_budgets_become_noise_and_mechanisms():
    for kind, shares in ((Central, 0), (Distributed, 6)):
        chosen = kind(4.0, counters={"train.loss": 50.0}, quantile=0.5, evaluation=3.0)
        noise = noise_for(chosen, 20)
        one = of_adapter(chosen, noise, Cohort(9, 6), {"train.loss": 2}, 0.4)
        assert (one.shares, one.clip, one.adaptive, set(one.counters)) == (shares, 0.4, True, {"train.loss"})
        two = of_evaluation(chosen, noise, Cohort(9, 6), {"train.loss": 2})
        spent = epsilon([one.event(100).times(20), two.event(2).times(20)], chosen.delta)
        assert 0.99 * 4.0 < spent <= 4.0


def test_colluding_sites_do_not_count_as_noise():
    assert of_adapter(Distributed(1.0, colluding=0.2), 1.0, Cohort(10, 8), {}, 1.0).shares == 6
    with pytest.raises(PrivacyError, match="colluding"):
        of_adapter(Distributed(1.0, colluding=0.8), 1.0, Cohort(10, 8), {}, 1.0)


def test_example_level_budgets_use_sampling():
    noise = steps_noise(Example(2.0), 0.01, 50)
    assert epsilon([Event(noise, 0.01, 50)], 1e-5) <= 2.0 < epsilon([Event(noise, 1.0, 50)], 1e-5)


def test_tables_become_settings():
    assert make_privacy("none") == PRIVACY["none"]()
    chosen = make_privacy({"kind": "central", "epsilon": 8, "counters": {"train.loss": 50}, "rate": 0.5})
    assert chosen == Central(8.0, counters={"train.loss": 50.0}, rate=0.5)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"kind": "central"}, "epsilon"),
        ({"kind": "central", "epsilon": 0}, "epsilon"),
        ({"kind": "distributed", "epsilon": 1, "rate": 0.5}, "rate"),
        ({"kind": "central", "epsilon": 1, "seed": 3}, "seed"),
        ({"kind": "central", "epsilon": 1, "clip": float("inf")}, "clip"),
        ({"kind": "laplace"}, "central"),
    ],
)
def test_wrong_tables_name_what_is_allowed(table, word):
    with pytest.raises(ConfigError, match=word):
        make_privacy(table)


def test_seeds_cannot_be_configured():
    for kind in PRIVACY.values():
        assert not any(word in item.name for item in dataclasses.fields(kind) for word in ("seed", "source", "generator", "random"))


def test_two_moving_factors_and_noise_clash():
    check_phase(Central(1.0), True, "alternating")
    check_phase(PRIVACY["none"](), False, "fedavg")
    with pytest.raises(PrivacyError, match="fedavg"):
        check_phase(Distributed(1.0), False, "fedavg")
