"""The table of a comparison, from figures."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from fedpeft.compare import report


def ran(scheme: str, seed: int, scores: dict[str, float], **more: Any) -> dict[str, Any]:
    costs = {"bytes_up": 1_000_000, "bytes_down": 2_000, "seconds": 3.0, "dropped": 0, "adapters": {}, "history": []}
    return {"settings": {"scheme": scheme}, "seed": seed, "metrics": dict.fromkeys(scores, "accuracy"), "scores": scores, **costs, **more}


def failed(scheme: str, seed: int) -> dict[str, Any]:
    return {"settings": {"scheme": scheme}, "seed": seed, "failed": "scheme: cannot be [bold]"}


DONE = [
    ran("a", 0, {"t": 0.5, "u": 0.7}),
    ran("a", 1, {"t": 0.6, "u": 0.7}),
    ran("b", 0, {"t": 0.9, "u": 0.1}),
    failed("b", 1),
    failed("c", 0),
]


def test_seeds_are_gathered_and_runs_that_failed_are_counted() -> None:
    first, half, none = report.collect(Path("f.toml"), ["scheme"], DONE)["cells"]
    assert first["scores"]["t"]["mean"] == pytest.approx(0.55)
    assert first["scores"]["t"]["std"] == pytest.approx(stdev([0.5, 0.6]))
    assert first["mean"]["values"] == pytest.approx([0.6, 0.65])
    assert (half["scores"]["t"]["std"], half["seeds"], half["failed"]) == (None, [0, 1], {"scheme: cannot be [bold]": 1})
    assert (none["scores"], none["mean"], none["bytes_up"]) == ({}, None, None)


@pytest.mark.parametrize(("tasks", "heads"), [(1, ["t0, accuracy"]), (3, None), (5, ["mean of tasks"])])
def test_many_tasks_are_one_column(tasks: int, heads: list[str] | None) -> None:
    found = report.collect(Path("f"), ["scheme"], [ran("a", 0, {f"t{n}": 0.5 for n in range(tasks)}), failed("b", 0)])
    columns, rows = report.table(found)
    assert columns[1:-3] == (heads or ["t0, accuracy", "t1, accuracy", "t2, accuracy", "mean of tasks"])
    assert rows[1] == ["b", *["-"] * (len(columns) - 1)]


def test_a_row_holds_its_spread_and_notes_say_why_others_have_none() -> None:
    found = report.collect(Path("f"), ["scheme"], DONE)
    assert report.table(found)[1][0] == ["a", "0.550 ± 0.071", "0.700 ± 0.000", "0.625 ± 0.035", "1.00 MB", "2.00 kB", "3.0"]
    one = report.collect(Path("f"), ["scheme"], DONE[:2])
    assert report.table(one)[0][0] == "t, accuracy"
    assert "in every run scheme=a" in list(report.notes(one)), "what does not vary is no column"
    assert "scheme=b: 1 run(s) without a result: scheme: cannot be [bold]" in list(report.notes(found))


def test_every_round_is_a_row_and_metrics_that_were_not_scored_are_empty() -> None:
    rows = [
        {"round": 1, "task": "t", "loss": 0.5, "scores": {}, "bytes_up": 1, "bytes_down": 2},
        {"round": 2, "task": "t", "loss": None, "scores": {"f1": 0.25}, "bytes_up": 3, "bytes_down": 4},
    ]
    text = report.history(["scheme"], [ran("a,b", 0, {"t": 0.5}, history=rows), failed("c", 0)])
    assert text.splitlines() == [
        "scheme,seed,round,task,loss,f1,bytes_up,bytes_down",
        '"a,b",0,1,t,0.5,,1,2',
        '"a,b",0,2,t,,0.25,3,4',
    ]
