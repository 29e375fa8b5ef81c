"""Every drop-out has a name: lies, vanished sites, rounds below the quorum."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedpeft.errors import CohortError
from fedpeft.routing.moments import MOMENTS
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_coordinator import display, roster
from fedpeft_coordinator.transport import Failure


def _wrong_layout(result: TaskResult, _arrays: dict[str, bytes]) -> None:
    result.layout_fingerprint = "00" * 32


def _cut(result: TaskResult, arrays: dict[str, bytes]) -> None:
    arrays[result.task] = arrays[result.task][:-4]


def _beyond(result: TaskResult, arrays: dict[str, bytes]) -> None:
    values = flat.unpack(arrays[result.task])[1].copy()
    values[3] = 2**31 - 1
    arrays[result.task] = flat.pack(result.layout_fingerprint, values)


def _float(result: TaskResult, arrays: dict[str, bytes]) -> None:
    values = flat.unpack(arrays[result.task])[1].astype(np.float32)
    arrays[result.task] = flat.pack(result.layout_fingerprint, values * np.float32("nan"))


def _heavy(result: TaskResult, _arrays: dict[str, bytes]) -> None:
    result.weight = 1000.0


def _nan_counter(result: TaskResult, _arrays: dict[str, bytes]) -> None:
    result.counters["train.loss"].values[0] = float("nan")


def _absent(result: TaskResult, arrays: dict[str, bytes]) -> None:
    del arrays[result.task]


def _refuse(result: TaskResult, _arrays: dict[str, bytes]) -> None:
    result.status, result.reason = TaskResult.STATUS_REFUSED, "max_rank: 8 > 4\n\x1b[31m"


def _fail(result: TaskResult, _arrays: dict[str, bytes]) -> None:
    result.status, result.reason = TaskResult.STATUS_FAILED, "out of memory"


LIES = {
    "layout is": _wrong_layout,
    "bytes follow": _cut,
    "at most": _beyond,
    "values are <f4|values are float32": _float,
    "weight 1000": _heavy,
    "not finite": _nan_counter,
    "no array": _absent,
    "refused: max_rank: 8 > 4 \\?\\[31m": _refuse,
    "failed: out of memory": _fail,
}


@pytest.mark.parametrize("reason", LIES)
def test_a_lie_is_a_named_drop_out(fake: ModuleType, tmp_path: Path, reason: str) -> None:
    honest = fake.Federation(tmp_path / "honest", fake.setup(rounds=1), {n: s for n, s in fake.sites().items() if n != "west"})
    honest.setup = fake.setup(rounds=1)
    federation = fake.Federation(tmp_path / "lie", fake.setup(rounds=1), fake.sites())
    federation.sites["west"].twist = lambda result, arrays: LIES[reason](result, arrays) if result.weight else None
    row = federation.open().run()[0].tasks["area"]
    assert row.outcome == "updated"
    assert list(row.drops) == ["west"]
    assert re.search(reason, row.drops["west"])
    assert row.counters["train.loss"] == (5.0, 4.0)


def test_counters_of_another_length_are_a_named_drop_out_and_measure_no_task_anew(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    federation.sites["north"].twist = _embed_wider  # the first to answer: nobody else would fit
    federation.open().run()
    said = {row["outcomes"]["area"] for row in federation.named("answer") if row["site"] == "north" and row["kind"] == "evaluate"}
    assert any("counter embedding.moments: 10 values, 6 were asked for" in why for why in said)
    counts = {task: release.router.moments.own.count for task, _, release in federation.published}
    assert counts == {"area": 2 * 5, "kind": 5}
    assert all("mahalanobis" in release.router.counts for _, _, release in federation.published)


def _embed_wider(result: TaskResult, _arrays: object) -> None:
    if MOMENTS in result.counters:
        result.counters[MOMENTS].values.extend([0.0] * 4)


def test_sites_that_rest_are_waited_for_and_use_up_no_attempts(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "LEAST_REST", 0.02)
    made = fake.setup(rounds=2, tasks=("area",), min_sites=3)
    made = replace(made, limits=replace(made.limits, retries=1, deadline=0.01))  # nobody who rests lets a deadline pass
    federation, left = fake.Federation(tmp_path, made, fake.sites()), 6

    def early(result: TaskResult, arrays: dict[str, bytes]) -> None:
        nonlocal left
        if left and result.weight:
            left -= 1
            arrays.clear()
            result.Clear()
            result.task, result.status, result.reason = "area", TaskResult.STATUS_RESTING, "hours: asked at 12:00, allowed 19:00-07:00"

    federation.sites["west"].twist = early
    rounds = federation.open().run()
    assert [row.tasks["area"].outcome for row in rounds] == ["updated"] * 2
    assert (left, rounds[0].attempt >= 6) == (0, True)
    assert {(row["site"], row["seconds"]) for row in federation.named("resting")} == {("west", 0)}
    assert re.search(r"west rests until \d\d:\d\d", str(display.said(federation.named("resting")[0])))


def test_a_site_that_vanishes_is_named_and_not_asked_again_until_it_returns(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    gone = False

    def fault(site: str, request: Envelope) -> Failure | None:
        nonlocal gone
        gone = gone or (site == "west" and request.kind == "train")
        return Failure("no answer within 2 s", vanished=True) if gone and site == "west" else None

    rounds = federation.open(fault=fault).run()
    assert rounds[0].tasks["area"].drops == {"west": "no answer within 2 s"}
    assert rounds[1].tasks["area"].cohort == ("north", "south")


def test_below_quorum_is_untouched_and_repeated_then_refused(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(min_sites=3), fake.sites())
    broken = federation.sites["west"]
    broken.twist = _fail
    with pytest.raises(CohortError, match=r"2 of 3 site\(s\) contributed, cohort\.min_sites = 3"):
        federation.open().run()
    assert len([row for row in federation.named("combined")]) == 3
    with pytest.raises(CohortError, match="in 3 attempts"):
        federation.open().run()
    assert len([row for row in federation.named("combined")]) == 6, "a coordinator that is started again tries as often again"
    broken.twist = lambda _result, _arrays: None
    last = federation.open().run()[-1]
    assert last.tasks["kind"].current == fake.start("kind").digest
    assert last.tasks["area"].outcome == "updated"


def test_a_skipped_first_round_does_not_waste_the_second(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(rounds=3), fake.sites())
    federation.sites["west"].twist = federation.sites["north"].twist = lambda r, a: _fail(r, a) if r.task == "kind" else None
    coordinator = federation.open()
    while not (coordinator.history and coordinator.history[-1].step == "published"):
        coordinator.step()
    federation.sites["west"].twist = federation.sites["north"].twist = lambda _r, _a: None
    rounds = coordinator.run()
    assert [row.tasks["kind"].outcome for row in rounds] == ["skipped", "updated", "updated"]
    assert [row.tasks["kind"].number for row in rounds] == [1, 1, 2]
    assert [row.tasks["kind"].phase for row in rounds] == ["B", "B", "A"]
    assert [row.tasks["area"].phase for row in rounds] == ["B", "A", "B"]
