"""Tasks that share a factor, through real rounds: one factor for all of a group, whoever is away, splits, clusters, crashes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.unit.coordinator.crashes import crash_everywhere

from fedpeft.schemes import Sharing
from fedpeft.tensors import Tensors
from fedpeft_coordinator import sharing as rules
from fedpeft_coordinator.state import TaskRound

HOLDINGS = {"east": {"area": 12, "kind": 9, "thing": 8}, "north": {"area": 40, "kind": 10}, "west": {"kind": 30, "thing": 7}}


def federation(fake: ModuleType, folder: Path, sharing: Sharing, holdings: Any = None, **extra: Any) -> Any:
    made = fake.setup(**{"server": "momentum", "rounds": 4, "reach": 16.0, **extra})
    common = fake.start("area").pick({"A"})
    tasks = {
        name: replace(task, initial=lambda name=name: fake.start(name).patch(common)) for name, task in made.tasks.items()
    }  # fmt: skip
    return fake.Federation(folder, replace(made, tasks=tasks, sharing=sharing), fake.sites(holdings or HOLDINGS))


def final(coordinator: Any) -> dict[str, Tensors]:
    rows = coordinator.history[-1].tasks
    return {name: coordinator.tensors(name, row.current) for name, row in rows.items()}


@pytest.mark.parametrize("share", ["A", "B", "both"])
def test_what_is_shared_has_the_same_bits_everywhere(fake: ModuleType, tmp_path: Path, share: Any) -> None:
    coordinator = federation(fake, tmp_path, Sharing(share)).open()
    rounds = coordinator.run()
    assert all(row.outcome == "updated" for done in rounds for row in done.tasks.values())
    found = list(final(coordinator).values())
    roles = Sharing(share).roles
    for tensors in found[1:]:
        for role in "AB":
            assert np.array_equal(found[0].pick({role}).flat, tensors.pick({role}).flat) == (role in roles)
        assert not np.array_equal(found[0].pick({"head"}).flat, tensors.pick({"head"}).flat)


def test_the_step_is_the_mean_over_all_sites_of_all_tasks(fake: ModuleType, tmp_path: Path) -> None:
    """With temperature 1 and plain averaging, against float64 from the sites' own goals."""
    coordinator = federation(fake, tmp_path, Sharing("A", temperature=1.0), server="sgd", rounds=2).open()
    _, second = coordinator.run()
    moves, rows = [], []
    for name, row in second.tasks.items():
        begin = coordinator.tensors(name, row.before).flat.astype(np.float64)
        for site in row.cohort:
            moves.append(0.25 * (fake.goal(site, name) - begin) + (row.seed % 7) / 1000)
            rows.append(HOLDINGS[site][name])
    step = np.average(moves, axis=0, weights=rows)
    span = fake.LAYOUT.role_spans["A"]
    row = second.tasks["area"]
    moved = coordinator.tensors("area", row.after).flat - coordinator.tensors("area", row.before).flat
    np.testing.assert_allclose(moved[span], step[span], atol=2e-5)


def test_crashes_before_and_after_every_commit_give_the_same_bits(fake: ModuleType, tmp_path: Path) -> None:
    whole, ours = (federation(fake, tmp_path / name, Sharing("A", report=True, split_after=1)) for name in ("whole", "ours"))
    whole.open().run()
    assert crash_everywhere(ours) >= 2 * 24
    assert ours.final() == whole.final()


@pytest.mark.parametrize("point", [7, 17])
def test_a_coordinator_that_starts_again_gives_the_same_bits(fake: ModuleType, tmp_path: Path, point: int) -> None:
    whole, ours = (federation(fake, tmp_path / name, Sharing("A", report=True, split_after=1)) for name in ("whole", "ours"))
    whole.open().run()
    coordinator = ours.open()
    for _ in range(point):
        coordinator.step()
    ours.open().run()
    assert ours.final() == whole.final()


def test_who_was_away_comes_back_with_the_groups_factor(fake: ModuleType, tmp_path: Path) -> None:
    """Task thing misses rounds 2 and 3 while A moves: it sits round 4 of A out, then fits its B and goes on with the group's A."""
    ours = federation(fake, tmp_path, Sharing("A"), rounds=6, server="adam")
    coordinator = ours.open()
    holds = {name: dict(site.holds) for name, site in ours.sites.items()}
    while coordinator.step():
        done = [row.number for row in coordinator.history if row.step == "published"]
        for name, site in ours.sites.items():
            site.holds = {task: n for task, n in holds[name].items() if task != "thing" or not 1 <= max(done, default=0) <= 2}
    seen = {row.number: row.tasks["thing"] for row in coordinator.history}
    moved = [number for number, row in seen.items() if row.after]
    assert moved == [1, 5, 6]
    assert all(seen[number].current == seen[1].after for number in (2, 3, 4)), "untouched, bit for bit, while away"
    assert "its group's factor" in seen[4].reason
    assert (seen[5].phase, seen[5].group) == ("B", rules.EVERYBODY)
    assert seen[5].before != seen[1].after
    assert np.array_equal(final(coordinator)["thing"].pick({"A"}).flat, final(coordinator)["area"].pick({"A"}).flat)


def test_a_task_that_cannot_follow_goes_on_alone(fake: ModuleType, tmp_path: Path) -> None:
    """Its product does not fit the group's factor: it keeps its own bits and leaves."""
    ours = federation(fake, tmp_path, Sharing("A"), rounds=4)
    lonely = replace(
        ours.setup.tasks["thing"], initial=lambda: fake.start("thing").patch(Tensors(fake.LAYOUT.subset({"B"}), np.ones(10, "f4")))
    )
    ours = replace(ours, setup=replace(ours.setup, tasks={**ours.setup.tasks, "thing": lonely}))
    coordinator = ours.open()
    rounds = coordinator.run()
    groups = [row.tasks["thing"].group for row in rounds]
    assert groups[-1] == rules.alone("thing")
    assert rounds[-1].tasks["thing"].outcome == "updated"
    assert not np.array_equal(final(coordinator)["thing"].pick({"A"}).flat, final(coordinator)["area"].pick({"A"}).flat)


def test_a_task_that_loses_leaves_and_the_report_says_by_how_much(fake: ModuleType, tmp_path: Path) -> None:
    ours = federation(fake, tmp_path, Sharing("A", report=True, split_after=1), rounds=6)
    coordinator = ours.open()
    rounds = coordinator.run()
    gains = {name: row.gain["gain"] for name, row in rounds[1].tasks.items()}
    for row in rounds[1].tasks.values():
        assert row.gain["gain"] == pytest.approx(row.gain["alone"] - row.gain["shared"])
    lost = {name for name, value in gains.items() if value < 0}
    assert lost, "different goals: somebody loses by the common step"
    assert {name for name, row in rounds[1].tasks.items() if row.moved_to} == lost
    assert {name for name, row in rounds[2].tasks.items() if row.group == rules.alone(name)} == lost
    told = ours.named("sharing")[0]["tasks"]
    assert {name: row["gain"]["gain"] for name, row in told.items()} == pytest.approx(gains)  # type: ignore[attr-defined]


def test_a_round_without_evaluation_scores_nothing_twice(fake: ModuleType, tmp_path: Path) -> None:
    ours = federation(fake, tmp_path, Sharing("A"), rounds=4)
    rounds = ours.open().run()
    assert not any(row.alone or row.gain for done in rounds for row in done.tasks.values())


def test_clusters_part_the_group(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "clusters", lambda _table: (0, 1, 0))
    ours = federation(fake, tmp_path, Sharing("A", cluster_after=2), rounds=4)
    coordinator = ours.open()
    rounds = coordinator.run()
    assert {name: row.group for name, row in rounds[2].tasks.items()} == {"area": "*.0", "kind": "*.1", "thing": "*.0"}
    found = final(coordinator)
    assert np.array_equal(found["area"].pick({"A"}).flat, found["thing"].pick({"A"}).flat)
    assert not np.array_equal(found["area"].pick({"A"}).flat, found["kind"].pick({"A"}).flat)


@pytest.mark.parametrize(
    ("gains", "after", "leaves"), [([-1.0], 1, True), ([1.0, -1.0], 2, False), ([-1.0, -1.0], 2, True), ([-1.0], 0, False)]
)
def test_leaving_needs_losses_in_a_row(gains: list[float], after: int, leaves: bool) -> None:
    rows = [TaskRound("t", "A", ("A",), ("s",), 1, 1, "d", "", group="*", gain={"gain": value}) for value in gains]
    history = [rules.Round(number, 0, "published", {"t": row}) for number, row in enumerate(rows[:-1], 1)]
    assert bool(rules.leaving(Sharing(split_after=after), rows[-1], history)) is leaves
