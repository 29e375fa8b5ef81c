"""Masked sums in few bits are those of the same codes in the clear."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.unit.coordinator.crashes import crash_everywhere
from tests.unit.coordinator.masked import STEPS, bend, clear, masked

from fedpeft.errors import CohortError
from fedpeft.wire.codecs import Int4, Ring
from fedpeft.wire.codecs.ring import packed_size
from fedpeft.wire.v1.federation_pb2 import RoundPlan


@pytest.fixture(scope="module")
def plain(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    federation = clear(fake, tmp_path_factory.mktemp("plain"))
    federation.rounds = federation.open().run()
    return federation


NARROW: dict[str, Any] = {"codec": Ring(4, 8), "reach": 16.0}


@pytest.fixture(scope="module")
def narrow(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In the clear, in as few bits."""
    federation = clear(fake, tmp_path_factory.mktemp("narrow"), rounds=4, **NARROW)
    federation.rounds = federation.open().run()
    return federation


def test_narrow_sums_under_masks_are_those_of_the_same_codes_in_the_clear(
    fake: ModuleType, plain: Any, narrow: Any, tmp_path: Path
) -> None:
    federation = masked(fake, tmp_path, rounds=4, **{**NARROW, "codec": Int4(8)})
    rounds = federation.open().run()
    assert federation.final() == narrow.final() != plain.final()
    for ours, theirs in zip(rounds, narrow.rounds, strict=True):
        for name, row in ours.tasks.items():
            assert (row.mean, row.weight, row.scores) == (theirs.tasks[name].mean, theirs.tasks[name].weight, theirs.tasks[name].scores)
            assert row.ring == {"kind": "ring", "bits": 8 if ours.number < 3 else 4, "block": 8, "headroom": 4.0}
    up = {len(vector) for site in federation.sites.values() for _, _, vector in site.left}
    # 10 of A or B and 12 of the head, 2 bits more than a site's for the sum of 4; weight and 21 limbs beside
    assert up == {packed_size(22, 10) + 4 * 21, packed_size(22, 6) + 4 * 21}


def test_scales_follow_the_last_mean_of_the_same_tensors(narrow: Any) -> None:
    asked = [envelope.open(RoundPlan) for envelope in narrow.sites["east"].asked if envelope.kind == "train"]
    scales = [next(task.scales for task in plan.tasks if task.task == "area") for plan in asked]
    rows = [past.tasks["area"] for past in narrow.rounds]
    assert len(set(scales[0])) == 1  # of what training can move, the same for all blocks
    assert set(rows[1].means.values()) == {rows[0].mean, rows[1].mean}
    assert set(rows[3].means.values()) == {rows[2].mean, rows[3].mean}
    store = narrow.open().store
    kept = store.tensors(rows[2].mean, narrow.sites["east"].layout.subset({"B", "head"}))  # for the next round that moves B
    assert kept.flat.any()
    assert scales[2] != scales[0]


def test_a_budget_narrows_masked_sums_and_a_task_that_it_cannot_hold_is_skipped_by_name(fake: ModuleType, tmp_path: Path) -> None:
    rows = masked(fake, tmp_path / "a", rounds=1, budget=4 * 26 + packed_size(22, 8)).open().run()[0].tasks
    assert {row.ring["bits"] for row in rows.values()} == {6}
    assert masked(fake, tmp_path / "b", rounds=1, budget=1000).open().run()[0].tasks["area"].ring is None
    with pytest.raises(CohortError, match=r"wire\.budget: 90 bytes for 22 values"):
        masked(fake, tmp_path / "c", rounds=1, budget=90, secure={}).open().run()


def test_crashes_before_and_after_every_commit_give_the_same_narrow_bits(fake: ModuleType, narrow: Any, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=4, **NARROW)
    assert crash_everywhere(federation) >= 2 * 16
    assert federation.final() == narrow.final()


def test_a_site_that_is_told_other_scales_is_never_part_of_a_sum(fake: ModuleType, tmp_path: Path) -> None:
    def other_scales(task: Any) -> None:
        if task.masking.step == STEPS["vector"] and task.scales:
            task.scales = bytes([task.scales[0] - 1]) + task.scales[1:]

    federation = masked(fake, tmp_path, rounds=1, **NARROW)
    bend(federation, "east", other_scales)
    row = federation.open().run()[0].tasks["area"]
    assert "the masked sum is for another plan" in row.drops["east"]
    assert row.outcome == "updated"
