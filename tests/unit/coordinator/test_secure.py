"""Masked sums over real rounds: the same bits as in the clear, whoever drops out when and wherever the coordinator dies."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.unit.coordinator.crashes import Crash, crash_at, crash_everywhere
from tests.unit.coordinator.masked import MANY, clear, masked, step_of

from fedpeft.errors import CohortError
from fedpeft.schemes import Sharing
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import RoundPlan, RoundReply
from fedpeft_coordinator.transport import Failure


@pytest.fixture(scope="module")
def plain(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    federation = clear(fake, tmp_path_factory.mktemp("plain"))
    federation.rounds = federation.open().run()
    return federation


def test_adapters_weights_counters_and_scores_are_those_of_the_run_in_the_clear(fake: ModuleType, plain: Any, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path)
    rounds = federation.open().run()
    assert federation.final() == plain.final()
    for ours, theirs in zip(rounds, plain.rounds, strict=True):
        for name, row in ours.tasks.items():
            assert (row.weight, row.counters["train.loss"]) == (theirs.tasks[name].weight, theirs.tasks[name].counters["train.loss"])
            assert row.scores == theirs.tasks[name].scores
            assert row.card == theirs.tasks[name].card
            assert row.sealed
    assert not list((tmp_path / "blobs").glob(f"{rounds[-1].tasks['area'].sealed}*"))


def test_tasks_that_share_a_factor_need_nothing_but_their_sums(fake: ModuleType, tmp_path: Path) -> None:
    common, finals = fake.start("area").pick({"A"}), []
    for kind in (clear, masked):
        ours = kind(fake, tmp_path / kind.__name__, rounds=4, server="momentum")
        tasks = {name: replace(task, initial=lambda n=name: fake.start(n).patch(common)) for name, task in ours.setup.tasks.items()}
        ours.setup = replace(ours.setup, tasks=tasks, sharing=Sharing("A", report=True))
        last = ours.open().run()[-1]
        assert all(row.gain for row in last.tasks.values())
        finals.append((ours.final(), {name: row.gain for name, row in last.tasks.items()}))
    assert finals[0] == finals[1]


def test_nothing_in_the_clear_is_on_the_wire(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    sent: list[Envelope] = []
    for name, site in list(federation.sites.items()):
        federation.sites[name] = lambda envelope, site=site: sent.append(reply := site(envelope)) or reply
        federation.sites[name].site = site
    federation.open().run()
    results = [result for reply in sent for result in (reply.open(RoundReply).results if b"base" not in reply.body else [])]
    assert all(result.weight == 0 and not result.counters for result in results)
    left = [row for site in federation.sites.values() for row in site.site.left]
    assert len(left) == 8
    wire = b"".join(array for reply in sent for array in reply.arrays.values())
    for _, codes, vector in left:
        assert codes.tobytes()[:32] not in wire
        assert vector.tobytes()[:32] in wire


@pytest.mark.parametrize("step", ["secure keys", "secure shares", "train vector", "secure agree", "secure reveal"])
def test_a_site_that_vanishes_at_any_step_is_a_drop_out(fake: ModuleType, tmp_path: Path, step: str) -> None:
    federation = masked(fake, tmp_path, rounds=1)

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("vanished", vanished=True) if site == "west" and step_of(request) == step else None

    rows = federation.open(fault=fault).run()[0].tasks
    before = step in ("secure keys", "secure shares", "train vector")
    others = {name: holds for name, holds in MANY.items() if name != "west"} if before else MANY
    oracle = clear(fake, tmp_path / "oracle", others, rounds=1)
    oracle.open().run()
    if before:
        # the cap of the weights and the grid are those of the planned cohort
        assert rows["area"].drops == {"west": "vanished"}
        assert rows["area"].weight == pytest.approx((12 + 40 + 25) / 40, abs=3e-6)
    else:
        assert rows["area"].drops == {}
        assert federation.final() == oracle.final()
    assert {row.outcome for row in rows.values()} == {"updated"}


def test_too_few_to_open_are_asked_again_and_then_refused(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    gone = {"west", "south"}

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("is busy") if site in gone and step_of(request) == "train vector" else None

    with pytest.raises(CohortError, match=r"2 of 4 sites delivered, 3 are needed; nothing is opened"):
        federation.open(fault=fault).run()
    assert len(federation.named("combined")) == 3
    gone.clear()
    federation.open().run()
    oracle = clear(fake, tmp_path / "oracle", rounds=1)
    oracle.open().run()
    assert federation.final() == oracle.final()


def test_a_sum_that_cannot_be_opened_is_skipped_and_the_next_round_goes_on(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=2)

    def fault(site: str, request: Envelope) -> Failure | None:
        late = step_of(request) == "secure reveal" and request.open(RoundPlan).round == 1
        return Failure("is busy") if late and site != "east" else None

    first, second = federation.open(fault=fault).run()
    assert {row.outcome for row in first.tasks.values()} == {"skipped"}
    assert "shares of its secret came" in first.tasks["area"].reason
    assert {row.outcome for row in second.tasks.values()} == {"updated"}
    assert [row.number for row in (first.tasks["area"], second.tasks["area"])] == [1, 1]


@pytest.mark.parametrize(("point", "before"), [(6, False), (10, True)])
def test_a_crash_at_a_commit_gives_the_same_bits(fake: ModuleType, plain: Any, tmp_path: Path, point: int, before: bool) -> None:
    federation = masked(fake, tmp_path)
    coordinator = federation.open()
    crash_at(coordinator, point, before)
    with pytest.raises(Crash):
        coordinator.run()
    federation.open().run()
    assert federation.final() == plain.final()


def test_crashes_before_and_after_every_commit_give_the_same_bits(fake: ModuleType, plain: Any, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path)
    assert crash_everywhere(federation) >= 2 * 15
    assert federation.final() == plain.final()


def test_crashes_within_every_step_give_the_same_bits(fake: ModuleType, plain: Any, tmp_path: Path) -> None:
    """One after the other, at the first and at the third message of each step."""
    steps = ("secure keys", "secure shares", "train vector", "secure agree", "secure reveal", "evaluate vector")
    federation, due = masked(fake, tmp_path), {(step, count) for step in steps for count in (1, 3)}
    seen: Counter[str] = Counter()

    def fault(_site: str, request: Envelope) -> Failure | None:
        seen[step_of(request)] += 1
        here = (step_of(request), seen[step_of(request)])
        if here in due:
            due.remove(here)
            raise Crash
        return None

    while due:
        seen.clear()
        with pytest.raises(Crash):
            federation.open(fault=fault).run()
    federation.open().run()
    assert federation.final() == plain.final()
    assert federation.open().history[-1].tasks["area"].scores == plain.rounds[-1].tasks["area"].scores
