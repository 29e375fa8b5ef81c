"""The table and the plot say what the figures say; what is known of an arm is taken from events and meters as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.parity import federating, figures, meter, plot, report
from fedpeft.parity.said import ARMS, size

SCORE = st.floats(0.0, 1.0)


def found(scores: dict[str, dict[str, float]], metrics: dict[str, str]) -> dict:
    return {
        "federation": "a & b",
        "sites": ["north", "south"],
        "rounds": 3,
        "metrics": metrics,
        "scores": scores,
        "mean": figures.means(metrics, scores),
        "examples": dict.fromkeys(ARMS, 1200),
        "bytes_up": {"local": 0, "federated": 1_234_567, "central": 50_000},
        "bytes_down": {"local": 0, "federated": 2_000, "central": 99},
        "seconds": {"local": 1.4, "federated": 60.0, "central": 20.0},
        "peak_bytes": {"local": 2_000_000_000, "federated": None, "central": 640_000_000},
        "engine": "local",
        "scored_by": "sites",
        "dropped": 2,
    }


def test_the_table_holds_every_figure() -> None:
    scores = {arm: {"kind": 0.25 * n, "mood": 0.5} for n, arm in enumerate(ARMS, 1)}
    shown = found(scores, {"kind": "accuracy", "mood": "accuracy"})
    rows = {name: cells for name, *cells in report.rows(shown)}
    assert rows["kind, accuracy"] == ["0.250", "0.500", "0.750"]
    assert rows["mean"] == ["0.375", "0.500", "0.625"]
    assert rows["bytes up"] == ["0 B", "1.23 MB", "50.0 kB"]
    assert rows["peak memory"] == ["2.00 GB", "-", "640 MB"]
    page = report.markdown(shown)
    assert all(f"| {name} | {' | '.join(cells)} |" in page for name, cells in rows.items())
    assert "2 contribution(s) dropped out" in page
    assert "local engine" in page


def test_metrics_of_different_kinds_have_no_mean() -> None:
    scores = {arm: {"kind": 0.5, "story": 40.0} for arm in ARMS}
    shown = found(scores, {"kind": "accuracy", "story": "perplexity"})
    assert shown["mean"] is None
    assert "mean" not in [name for name, *_ in report.rows(shown)]
    assert "of perplexity less is better" in report.markdown(shown)
    assert "perplexity \u2193" in plot.svg(shown)
    assert [group.top for group in plot.groups_of(shown)] == [1.0, 40.0]


@given(values=st.lists(st.tuples(SCORE, SCORE, SCORE), min_size=1, max_size=5))
def test_bars_are_as_tall_as_scores(values: list[tuple[float, float, float]]) -> None:
    metrics = {f"t{n}": "accuracy" for n in range(len(values))}
    scores = {arm: {f"t{n}": value[place] for n, value in enumerate(values)} for place, arm in enumerate(ARMS)}
    picture = ElementTree.fromstring(plot.svg(found(scores, metrics)))
    bars = [item.attrib for item in picture if item.tag.endswith("rect") and item.get("width") == f"{plot.BAR - 4:.1f}"]
    wanted = [group.scores[arm] for group in plot.groups_of(found(scores, metrics)) for arm in ARMS]
    assert len(bars) == len(wanted)
    for bar, score in zip(bars, wanted, strict=True):
        assert float(bar["height"]) == pytest.approx(score * (plot.BOTTOM - plot.TOP), abs=0.06)
        assert float(bar["y"]) + float(bar["height"]) == pytest.approx(plot.BOTTOM, abs=0.11)
        assert float(bar["x"]) + float(bar["width"]) < float(picture.attrib["width"]) - plot.COST_WIDTH
    texts = [item.text for item in picture.iter() if item.tag.endswith("text")]
    assert "1.23 MB" in texts
    assert "not known" in texts


@given(value=st.integers(0, 10**12))
def test_sizes_keep_about_three_digits(value: int) -> None:
    number, unit = size(value).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(number) * scale == pytest.approx(value, rel=6e-3)


def answer(kind: str, number: int, outcome: str, up: int) -> dict:
    return {"event": "answer", "kind": kind, "round": number, "outcomes": {"kind": outcome}, "bytes_up": up, "bytes_down": 2 * up}


def test_a_score_that_a_site_had_no_part_in_is_not_everybodys() -> None:
    events = [
        answer("train", 1, "failed: x", 1),
        answer("evaluate", 1, "failed: x", 10),
        answer("evaluate", 2, "ok", 100),
        {"event": "scores", "round": 1, "tasks": {"kind": {"accuracy": 0.1}}},
        {"event": "scores", "round": 2, "tasks": {"kind": {"accuracy": 0.9}, "mood": {}}},
    ]
    assert federating.final_scores(events) == {"kind": {"accuracy": 0.9}}
    assert federating.travelled(events) == {"up": 111, "down": 222}
    assert federating.final_scores([*events, answer("evaluate", 2, "no answer", 0)]) == {}
    assert federating.final_scores([]) == {}


def test_the_meter_goes_on_and_sees_grandchildren(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"seconds": 100.0, "peak_bytes": 7}))
    grown = "import subprocess, sys; b = bytearray(60 << 20); print(len(b), flush=True); sys.stdin.read()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grown!r}])"
    with meter.metered(path):
        child = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline()
        assert child.pid in meter.descendants(1) or child.pid in meter.descendants(meter.os.getpid())
        assert meter.highest(meter.os.getpid()) > 60 << 20
        meter.threading.Event().wait(meter.EVERY_SECONDS * 2)
        child.communicate()
    cost = meter.read(path)
    assert cost.seconds > 100 + meter.EVERY_SECONDS
    assert cost.peak_bytes is not None
    assert cost.peak_bytes > 60 << 20
    path.write_text("{torn")
    assert meter.read(path) == meter.Cost()
