"""Robust rules over masked sums of groups: the bits of the clear, and no sum over fewer is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.unit.coordinator.crashes import crash_everywhere
from tests.unit.coordinator.masked import Guarded, step_of

from fedpeft.privacy.secagg import Collector
from fedpeft.schemes.robust import Buckets
from fedpeft.wire import Envelope
from fedpeft.wire.codecs import Ring
from fedpeft_coordinator.setup import SecureAggregation
from fedpeft_coordinator.transport import Failure
from fedpeft_coordinator.updates import groups

CROWD = {f"s{number:02}": {"area": 20 + number} for number in range(13)}
OVER = {"server": "sgd", "reach": 64.0}


def grouped(fake: ModuleType, folder: Path, secure: bool = True, rounds: int = 2, **extra: Any) -> Any:
    """Thirteen sites in four groups, under the geometric median of the groups."""
    made = fake.setup(rounds=rounds, tasks=("area",), min_sites=9, **{**OVER, **extra})
    settings = SecureAggregation(least=9, grouped=3) if secure else None
    setup = replace(made, combine=Buckets(3), secure=settings, evaluate_every=0)
    sites = fake.sites(CROWD)
    return fake.Federation(folder, setup, {name: Guarded(site, folder / "sites") if secure else site for name, site in sites.items()})


@pytest.mark.parametrize("codec", [{}, {"codec": Ring(6, 8)}], ids=["wide", "narrow"])
def test_a_rule_over_masked_sums_of_groups_gives_the_bits_of_the_clear(fake: ModuleType, tmp_path: Path, codec: dict[str, Any]) -> None:
    ours, oracle = grouped(fake, tmp_path, **codec), grouped(fake, tmp_path / "clear", secure=False, **codec)
    rounds = ours.open().run()
    oracle.open().run()
    assert all((row.tasks["area"].outcome, row.tasks["area"].ring is not None) == ("updated", bool(codec)) for row in rounds)
    assert ours.final() == oracle.final()
    parted = [groups(ours.setup, row.tasks["area"]) for row in rounds]
    assert sorted(map(len, parted[0])) == [3, 3, 3, 4]
    assert parted[0] != parted[1]  # dealt anew in every round


def test_no_sum_over_fewer_than_a_group_is_ever_opened(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, ...]] = []
    result = Collector.result
    monkeypatch.setattr(Collector, "result", lambda self, schema: (opened.append(self.survivors), result(self, schema))[1])
    federation = grouped(fake, tmp_path, rounds=1)
    row = federation.open().run()[0].tasks["area"]
    assert sorted(map(sorted, opened[:4])) == sorted(map(sorted, groups(federation.setup, row)))
    assert {len(survivors) for survivors in opened[4:]} == {len(CROWD)}  # the evaluations


@pytest.mark.parametrize("step", ["train vector", "secure reveal"])
def test_a_group_that_is_lost_takes_its_sites_with_it_and_no_others(fake: ModuleType, tmp_path: Path, step: str) -> None:
    federation = grouped(fake, tmp_path, rounds=1)
    planned = grouped(fake, tmp_path / "plan", rounds=1).open()
    planned.step()
    gone = next(group for group in groups(federation.setup, planned.history[0].tasks["area"]) if len(group) == 3)

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("is busy") if site in gone[:2] and step_of(request) == step else None

    row = federation.open(fault=fault).run()[0].tasks["area"]
    assert row.outcome == "updated"
    assert set(row.drops) == set(gone)
    held = {name: holds for name, holds in CROWD.items() if name not in gone}
    assert row.weight == pytest.approx(sum(holds["area"] for holds in held.values()) / 32, abs=2e-5)


def test_liars_in_one_group_do_not_move_a_rule_over_groups(fake: ModuleType, tmp_path: Path) -> None:
    lied = grouped(fake, tmp_path / "lied", rounds=1)
    honest, summed = (grouped(fake, tmp_path / name, rounds=1, secure=False) for name in ("honest", "summed"))  # the bits of masked ones
    summed.setup = replace(summed.setup, combine=None)
    planned = grouped(fake, tmp_path / "plan", rounds=1).open()
    planned.step()
    liars = groups(lied.setup, planned.history[0].tasks["area"])[0]
    for federation in (lied, summed):
        for name in liars:
            getattr(federation.sites[name], "site", federation.sites[name]).pull = -20.0
    moved = {}
    for name, federation in (("honest", honest), ("lied", lied), ("summed", summed)):
        coordinator = federation.open()
        row = coordinator.run()[0].tasks["area"]
        moved[name] = coordinator.tensors("area", row.after).flat
    away = {name: float(np.linalg.norm(moved[name] - moved["honest"])) for name in ("lied", "summed")}
    assert away["summed"] > 10 * away["lied"] > 0


def test_crashes_before_and_after_every_commit_give_the_same_bits_with_groups(fake: ModuleType, tmp_path: Path) -> None:
    whole, federation = grouped(fake, tmp_path / "whole", secure=False, rounds=1), grouped(fake, tmp_path, rounds=1)
    whole.open().run()
    assert crash_everywhere(federation) >= 2 * 5
    assert federation.final() == whole.final()
