"""The site's half of privacy: what it refuses, what it counts, what it adds by itself, and what a dry run foresees."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy import promise
from fedpeft.privacy.mechanism import SIDE, Mechanism
from fedpeft.privacy.promise import Single, Whole
from fedpeft.privacy.secagg import Instance
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.training import TrainSettings
from fedpeft_client.config import Policy, SiteConfig
from fedpeft_client.dry_run import forecast, read_plan
from fedpeft_client.privacy import Guard, Steps

LAYOUT = Layout.of([Entry("B", "q.lora_B", (30, 4))])
WHOLE = Whole(8.0, 1e-5, Mechanism(2.0, 1.0, 4))
EVENTS = Guard("a", Policy(), Path("unused")).events(WHOLE, LAYOUT, None)


def guard(folder: Path, **policy: Any) -> Guard:
    return Guard("a", Policy(**policy), folder / "ledger")


def test_an_answer_costs_once_however_often_it_leaves_and_another_costs_more(tmp_path: Path) -> None:
    first = guard(tmp_path).foresee("run/1/t/one", "t", "adapter", EVENTS)
    spent = [guard(tmp_path).spend(first) for _ in range(3)]
    assert spent == [first.epsilon] * 3
    second = guard(tmp_path).foresee("run/2/t/two", "t", "adapter", EVENTS)
    assert second.epsilon > spent[0]
    assert guard(tmp_path).spend(second) == second.epsilon
    assert guard(tmp_path).foresee("run/1/u/one", "u", "adapter", EVENTS).epsilon == spent[0]


def test_a_budget_that_is_spent_lets_nothing_leave(tmp_path: Path) -> None:
    one = guard(tmp_path, max_epsilon=2.5)
    one.spend(one.foresee("r/1", "t", "adapter", EVENTS))
    with pytest.raises(PrivacyError, match="has spent epsilon"):
        one.spend(one.foresee("r/2", "t", "adapter", EVENTS))
    assert len(one.ledger.entries()) == 1


def test_sampling_that_a_site_cannot_see_gains_it_nothing() -> None:
    sampled = Whole(8.0, 1e-5, Mechanism(2.0, 1.0, 4, rate=0.1))
    assert guard(Path()).events(sampled, LAYOUT, None) == EVENTS


def test_the_larger_of_plan_noise_and_own_noise_counts() -> None:
    ((_, event),) = guard(Path(), clip=1.0, noise=5.0).events(WHOLE, LAYOUT, None)
    assert event.noise == pytest.approx(5.0)
    ((_, event),) = guard(Path(), clip=1.0, noise=0.5).events(WHOLE, LAYOUT, None)
    assert event.noise == 2.0


@pytest.mark.parametrize(
    ("shares", "members", "words"),
    [(3, None, "send in the clear"), (4, 4, "divided among 4 sites, the masks open with 3"), (3, 4, None), (0, None, None)],
)
def test_noise_that_others_would_have_to_carry_is_refused(shares: int, members: int | None, words: str | None) -> None:
    instance = None if members is None else Instance("x", tuple(map(str, range(members))))
    asked = Whole(8.0, 1e-5, Mechanism(2.0, 1.0, 4, shares))
    with contextlib.nullcontext() if words is None else pytest.raises(PrivacyError, match=words):
        guard(Path()).check(asked, instance, LAYOUT)


def test_own_clip_and_noise_are_of_the_size_that_the_policy_says() -> None:
    wide = Layout.of([Entry("B", "q.lora_B", (200, 20))])
    delta = Tensors(wide, np.full(wide.size, 3.0, np.float32))
    assert guard(Path(), clip=0.5).disturb(delta).norm() == pytest.approx(0.5, rel=1e-5)
    noisy = guard(Path(), clip=0.5, noise=2.0).disturb(delta).flat
    assert noisy.std() == pytest.approx(1.0, rel=0.1)
    assert guard(Path()).disturb(delta) is delta
    with pytest.raises(ValueError, match=r"policy\.noise = 2 and no policy\.clip"):
        Policy(noise=2.0)


def test_rows_are_protected_over_all_rounds_of_the_run() -> None:
    plan = Single(4.0, 1e-5, 1.0, rounds=10)
    steps = Steps.of(plan, TrainSettings(steps=5, batch_size=4), 100)
    assert (steps.rate, steps.count, steps.engine.noise_multiplier) == (0.04, 5, steps.noise)
    from fedpeft.privacy.accounting import epsilon

    assert 3.9 < epsilon([steps.event.times(10)], 1e-5) <= 4.0
    assert Steps.of(dataclasses.replace(plan, rounds=40), TrainSettings(steps=5, batch_size=4), 100).noise > steps.noise


def test_a_plan_that_noises_two_factors_or_misses_its_masks_is_refused(site: SiteConfig, make_worker, plans) -> None:
    asked = {
        "needs one factor": plans.of(privacy_json=promise.dumps(WHOLE), scheme="fedavg"),
        "send in the clear": plans.of(privacy_json=promise.dumps(Whole(8.0, 1e-5, Mechanism(2.0, 1.0, 4, 3)))),
        "cannot be read": plans.of(privacy_json="{}"),
    }
    for words, plan in asked.items():
        reply = make_worker(site).handle(plans.message(plan))
        assert words in plans.results(reply)["kinds"].reason
        assert not reply.arrays


def test_what_leaves_is_bounded_and_weighs_as_much_as_any_other(site: SiteConfig, make_worker, plans) -> None:
    asked = Whole(8.0, 1e-5, Mechanism(2.0, 1e-3, 3, adaptive=True, side=0.1))
    plan = plans.of(privacy_json=promise.dumps(asked))
    reply = make_worker(site).handle(plans.message(plan))
    result = plans.results(reply)["kinds"]
    layout = asked.mechanism.layout(plans.spec().layout.subset({"B", "head"}))
    codes = reply.array("kinds", layout.fingerprint)
    length = np.linalg.norm(codes * asked.mechanism.grid.step)
    assert length <= asked.mechanism.sensitivity
    assert length == pytest.approx(asked.mechanism.sensitivity, rel=1e-3)
    assert (result.weight, dict(result.counters), result.epsilon > 0) == (1.0, {}, True)
    assert SIDE in layout.roles
    again = make_worker(site).handle(plans.message(plan))
    assert again.arrays == reply.arrays
    assert len(Guard("site-a", site.policy, site.state / "ledger").ledger.entries()) == 1


def test_tensors_that_did_not_move_are_not_sent(site: SiteConfig, make_worker, plans) -> None:
    plan = plans.of(privacy_json=promise.dumps(WHOLE), settings={"lr": 1e-30})
    result = plans.results(make_worker(site).handle(plans.message(plan)))["kinds"]
    assert "did not move" in result.reason
    assert not Guard("site-a", site.policy, site.state / "ledger").ledger.entries()


FEDERATION = """
rounds = 4
[method]
kind = "lora"
r = 4
[training]
steps = 2
batch_size = 2
[cohort]
min_sites = 3
[privacy]
{privacy}
[tasks.kinds]
kind = "classification"
labels = ["animal", "tool"]
"""


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ('kind = "central"\nepsilon = 4.0', "protects the whole site .* the coordinator adds the noise"),
        ('kind = "distributed"\nepsilon = 4.0\ncounters = { "train.loss" = 9.0 }', "this site adds 1/3 of the noise"),
        ('kind = "example"\nepsilon = 4.0', "protects single rows"),
    ],
)
def test_a_dry_run_foresees_epsilon_per_round_per_run_and_what_is_spent(site: SiteConfig, tmp_path: Path, privacy: str, words: str) -> None:
    (tmp_path / "f.toml").write_text(FEDERATION.format(privacy=privacy))
    (one,) = forecast(site, read_plan(tmp_path / "f.toml"))
    assert 0 < one.cost.round < one.cost.run
    assert 3.9 < one.cost.run <= 4.0
    assert one.cost.spent == 0.0
    assert one.refused is None
    assert one.epsilon.startswith(f"{one.cost.round:.3f} in a round")
    import re

    assert re.search(words, one.epsilon)
    strict = site.model_copy(update={"policy": site.policy.model_copy(update={"max_epsilon": 0.5})})
    (refused,) = forecast(strict, read_plan(tmp_path / "f.toml"))
    assert "max_epsilon: asked epsilon" in refused.refused
    if "counters" in privacy:
        assert set(one.counters) == {"train.loss"}


def test_a_dry_run_counts_what_the_site_spent_before(site: SiteConfig, tmp_path: Path) -> None:
    mine = Guard("site-a", site.policy, site.state / "ledger")
    mine.spend(mine.foresee("earlier/1", "kinds", "adapter", EVENTS))
    (tmp_path / "f.toml").write_text(FEDERATION.format(privacy='kind = "central"\nepsilon = 4.0'))
    (one,) = forecast(site, read_plan(tmp_path / "f.toml"))
    assert one.cost.spent == mine.ledger.spent(1e-5, "kinds")
    assert one.cost.after > one.cost.spent
    (tmp_path / "f.toml").write_text(FEDERATION.format(privacy='kind = "other"'))
    with pytest.raises(ConfigError, match="unknown kind 'other'"):
        forecast(site, read_plan(tmp_path / "f.toml"))


@settings(max_examples=60)
@given(data=st.data())
def test_any_promise_is_refused_by_name_or_read(data, tables) -> None:
    for whole in (WHOLE, Single(4.0, 1e-5, 1.0, 10)):
        garbled = json.dumps(data.draw(tables(json.loads(promise.dumps(whole)))), default=str)
        with contextlib.suppress(PrivacyError):
            read = promise.loads(garbled)
            assert promise.loads(promise.dumps(read)) == read
        assert promise.loads(promise.dumps(whole)) == whole
