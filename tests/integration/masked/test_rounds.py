"""Real workers under masks end at the bits of those in the clear, in wide sums and in narrow ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.integration.masked.staging import SITES, in_memory, same, stage

from fedpeft.bases import Base
from fedpeft_coordinator.state import TaskRound

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_real_workers_that_demand_masks_end_at_the_bits_of_the_clear(tmp_path: Path, base: Base, clear: list[TaskRound]) -> None:
    rows, _ = in_memory(stage(tmp_path / "f", 1, masked=True), base)
    same(rows, clear)
    for name in SITES:
        left = [json.loads(line) for line in (tmp_path / "f" / name / "audit.jsonl").read_text().splitlines()]
        assert all(line["masked"] and not line["weight"] and not line["counters"] for line in left)
        assert [line["masked"].split()[0] for line in left][:5] == ["keys", "shares", "vector", "agree", "reveal"]


def test_narrow_sums_under_masks_end_at_the_bits_of_narrow_sums_in_the_clear(tmp_path: Path, base: Base, clear: list[TaskRound]) -> None:
    off, ring = {"secure_aggregation.enabled": "false"}, {"wire.codec": '{kind = "ring", bits = 8}'}
    theirs, _ = in_memory(stage(tmp_path / "clear", 1, masked=False), base, **off, **ring)
    rows, _ = in_memory(stage(tmp_path / "f", 1, masked=True), base, **{"wire.codec": "int8"})
    same(rows, theirs)
    assert [row.after for row in rows] != [row.after for row in clear]
    assert abs(rows[-1].counters["train.loss"][0] / clear[-1].counters["train.loss"][0] - 1) < 0.02
    left = [json.loads(line) for line in (tmp_path / "f" / "north" / "audit.jsonl").read_text().splitlines()]
    heads = {line["tensors"]["head"] for line in left if line["tensors"]}
    assert heads == {round(2 * (384 + 1) * 10 / 8)}  # 10 bits a value: 8 and the sum of three


def test_sites_that_demand_masks_refuse_a_federation_without(tmp_path: Path, base: Base) -> None:
    from fedpeft.errors import CohortError

    with pytest.raises(CohortError):
        in_memory(stage(tmp_path / "f", 1, masked=True), base, **{"secure_aggregation.enabled": "false", "cohort.retries": "0"})
    said = (tmp_path / "f" / "north" / "audit.jsonl").read_text()
    assert "require_secure_aggregation: asked without secure aggregation" in said
