"""Clusters of a task that nobody declared, through real rounds: sites part by what they are, and only their choice is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.unit.coordinator.crashes import crash_everywhere

from fedpeft.schemes import ifca
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import Capabilities, Holding, RoundPlan, RoundReply, TaskResult
from fedpeft_coordinator.state import Round

POPULATIONS = {"a1": "x", "a2": "x", "a3": "x", "b1": "y", "b2": "y", "b3": "y"}


class Chooser:
    """A fake site whose rows are of one of two populations; it takes the cluster whose adapter is nearest to its goal."""

    def __init__(self, fake: ModuleType, name: str) -> None:
        self.site = fake.Site(name, {cluster: 10 for cluster in ifca.names("chat", 2)}, pull=0.5)
        self.goal, self.chose = fake.goal(POPULATIONS[name], "chat"), []
        self.kinds: list[str] = []

    def __call__(self, envelope: Envelope) -> Envelope:
        self.kinds.append(envelope.kind)
        if envelope.kind == "hello":
            return Envelope.of(
                "reply", Capabilities(site=self.site.name, holdings=[Holding(task="chat", train_examples=10, test_examples=5)])
            )
        if envelope.kind != "choose":
            return self.site(envelope)
        asked = envelope.open(RoundPlan)
        losses = {plan.task: float(np.sum((self.site._begin(envelope, plan).flat - self.goal) ** 2)) for plan in asked.tasks}
        self.chose.append(ifca.choose(losses, self.site.name))
        results = [self._said(plan.task) for plan in asked.tasks]
        return Envelope.of("reply", RoundReply(site=self.site.name, run=asked.run, round=asked.round, results=results))

    def _said(self, task: str) -> TaskResult:
        return TaskResult(task=task, status=TaskResult.STATUS_OK if task == self.chose[-1] else TaskResult.STATUS_REFUSED)


def federation(fake: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int = 8) -> Any:
    goals = fake.goal
    monkeypatch.setattr(fake, "goal", lambda site, task, layout=fake.LAYOUT: goals(POPULATIONS.get(site, site), "chat", layout))
    made = fake.setup(rounds=rounds, tasks=ifca.names("chat", 2), server="sgd", reach=32.0)
    table = json.dumps({"kind": "classification", "name": "chat"})
    alike = {"rows": "chat", "task_json": table, "initial": lambda: fake.start("chat")}  # as LoRA's B = 0 is, whatever A
    tasks = {name: replace(task, **alike) for name, task in made.tasks.items()}
    setup = replace(made, tasks=tasks)
    return fake.Federation(folder, setup, {name: Chooser(fake, name) for name in POPULATIONS})


def parts(done: Round) -> set[frozenset[str]]:
    return {frozenset(row.cohort) for row in done.tasks.values() if row.cohort}


def test_sites_part_by_what_they_are(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = federation(fake, tmp_path, monkeypatch)
    rounds = ours.open().run()
    assert parts(rounds[-1]) == {frozenset({"a1", "a2", "a3"}), frozenset({"b1", "b2", "b3"})}
    for done in rounds:
        taken = [site for row in done.tasks.values() for site in row.cohort]
        assert sorted(taken) == sorted(POPULATIONS), "each site trains one cluster in each round"
        assert not any(row.drops for row in done.tasks.values()), "a choice is no drop-out"
    assert all(site.kinds.count("choose") == len(rounds) for site in ours.sites.values())
    assert ours.named("choices")[0]["passed"].keys() == POPULATIONS.keys()


def test_scores_come_from_those_who_took_the_cluster(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = federation(fake, tmp_path, monkeypatch)
    last = ours.open().run()[-1]
    assert all(row.scores["accuracy"] >= 0 for row in last.tasks.values())
    scored = {
        site.site.name: {
            plan.task for envelope in site.site.asked if envelope.kind == "evaluate" for plan in envelope.open(RoundPlan).tasks
        }
        for site in ours.sites.values()
    }
    assert all(len(tasks) >= 1 for tasks in scored.values())
    assert {task for row in last.tasks.values() for task in [row.task]} == set(ifca.names("chat", 2))


def test_a_site_that_does_not_say_takes_none(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = federation(fake, tmp_path, monkeypatch, rounds=2)
    ours.sites["b3"]._said = lambda task: TaskResult(task=task, status=TaskResult.STATUS_FAILED, reason="no rows")
    rounds = ours.open().run()
    assert all("b3" not in row.cohort for done in rounds for row in done.tasks.values())
    assert all(row.outcome == "updated" for row in rounds[-1].tasks.values() if row.cohort)


def test_crashes_before_and_after_every_commit_give_the_same_bits(
    fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ours = (federation(fake, tmp_path / name, monkeypatch, rounds=2) for name in ("whole", "ours"))
    whole.open().run()
    assert crash_everywhere(ours) >= 2 * 10
    assert ours.final() == whole.final()


@pytest.mark.parametrize("least", [2, 6])
def test_who_comes_while_a_round_is_planned_is_not_asked_for_every_cluster(
    fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """``b3`` comes after the others chose: it takes no part in that round; where the round cannot begin without it, it chooses first."""
    ours = federation(fake, tmp_path, monkeypatch, rounds=2)
    ours.setup = replace(ours.setup, limits=replace(ours.setup.limits, min_sites=least, wait_for_sites=5))
    monkeypatch.setattr(ifca, "choose", lambda losses, _site: min(losses))
    late = ours.sites.pop("b3")
    coordinator = ours.open()
    for site in ours.sites.values():
        real = site._said
        site._said = lambda task, real=real: (coordinator.transport.handlers.setdefault("b3", late), real(task))[1]
    first, second = coordinator.run()
    asked = [{plan.task for plan in envelope.open(RoundPlan).tasks} for envelope in late.site.asked if envelope.kind == "train"]
    assert all(len(tasks) == 1 for tasks in asked), "it trains one cluster in each round"
    taken = [sorted(site for row in done.tasks.values() for site in row.cohort) for done in (first, second)]
    here = [name for name in sorted(POPULATIONS) if name != "b3" or least == 6]
    assert taken == [here, sorted(POPULATIONS)]
    assert len(late.chose) == len(asked) == (1 if least == 2 else 2)
