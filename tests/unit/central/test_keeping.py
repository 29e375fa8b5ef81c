"""Which checkpoints stay, and what a job says of itself; without a model."""

from __future__ import annotations

import io
import json
import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import nullcontext
from math import nan
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedpeft.central import progress
from fedpeft.central.course import Course
from fedpeft.central.keeping import Keeper
from fedpeft.central.progress import Clock, Report
from fedpeft.central.world import World
from fedpeft.errors import ConfigError, DataError
from fedpeft.training import checkpoint
from fedpeft.training.checkpoint import FILE, Checkpoint, Tally
from fedpeft.training.config import Checkpoints, Evaluate
from fedpeft.training.trackers import TRACKERS, TensorBoard, Trackio

HEADLINES = {"a": "accuracy", "b": "accuracy"}


def write(folder, step, job="job"):
    checkpoint.save(folder, Checkpoint(job, Tally(step=step), {"a|value": np.full(3, step, np.float32)}))


def scores(a, b):
    return {"a": {"accuracy": a}, "b": {"accuracy": b}}


def steps(folder):
    return sorted(int(path.name[5:13]) for path in folder.glob("step-*.safetensors"))


@settings(max_examples=12)
@given(
    merits=st.lists(st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(0, 1))), min_size=1, max_size=8),
    keep=st.integers(1, 4),
    best=st.sampled_from([None, "mean", "worst", "b"]),
)
def test_the_latest_and_the_best_of_all_stay(tmp_path_factory, merits, keep, best):
    folder = tmp_path_factory.mktemp("kept")
    keeper = Keeper(folder, keep, best, HEADLINES)
    rule = {"mean": np.mean, "worst": np.min, "b": lambda pair: pair[1], None: None}[best]
    for step, merit in enumerate(merits, 1):
        write(folder, step)
        keeper.save("job", step, {} if merit is None else scores(*merit))
        seen = [(float(rule(pair)), -at) for at, pair in enumerate(merits[:step], 1) if pair is not None] if rule else []
        top = {-max(seen)[1]} if seen else set()
        assert steps(folder) == sorted(set(range(max(1, step - keep + 1), step + 1)) | top)
        assert (keeper.chosen().step if keeper.chosen() else None) == (next(iter(top)) if top else None)
        for at in steps(folder):
            assert checkpoint.read(folder, f"step-{at:08}.safetensors").tally.step == at


def test_less_perplexity_is_better_and_a_task_without_scores_is_named(tmp_path):
    keeper = Keeper(tmp_path, 1, "mean", {"a": "perplexity"})
    for step, value in enumerate((nan, 3.0, 2.0, 2.5), 1):
        write(tmp_path, step)
        keeper.save("job", step, {"a": {"perplexity": value}})
    assert keeper.chosen().step == 3
    for best, refused in (("mean", True), ("worst", True), ("b", True), ("a", False), (None, False)):
        keeper = Keeper(tmp_path, 1, best, HEADLINES)
        with pytest.raises(DataError, match=r"tasks \['b'\] have no test rows") if refused else nullcontext():
            keeper.require(["a"])


def test_another_job_and_steps_done_again_forget_what_was_kept(tmp_path):
    keeper = Keeper(tmp_path, 2, "mean", HEADLINES)
    for step, value in enumerate((0.9, 0.5, 0.4), 1):
        write(tmp_path, step)
        keeper.save("job", step, scores(value, value))
    write(tmp_path, 2)
    keeper.save("job", 2, scores(0.1, 0.1))
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, 1, "other")
    keeper.save("other", 1, scores(0.0, 0.0))
    assert (steps(tmp_path), keeper.chosen().scores) == ([1], scores(0.0, 0.0))


def test_a_torn_last_checkpoint_is_replaced_by_the_newest_whole_one(tmp_path, caplog):
    keeper = Keeper(tmp_path, 3, None, HEADLINES)
    for step in (1, 2, 3):
        write(tmp_path, step)
        keeper.save("job", step, {})
    keeper.repair()
    assert checkpoint.read(tmp_path).tally.step == 3
    for name in (FILE, "step-00000003.safetensors"):
        body = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(body[:-1])
    with caplog.at_level(logging.WARNING):
        keeper.repair()
    assert checkpoint.read(tmp_path).tally.step == 2
    assert "goes on from step 2" in caplog.text


def test_a_file_system_without_links_gets_copies_and_a_broken_record_counts_for_nothing(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    keeper = Keeper(tmp_path, 1, None, HEADLINES)
    write(tmp_path, 1)
    keeper.save("job", 1, {})
    assert checkpoint.read(tmp_path, "step-00000001.safetensors").tally.step == 1
    (tmp_path / "kept.json").write_text('{"job": 3')
    assert keeper.kept() == []
    assert "no earlier checkpoint counts" in caplog.text


REPORT = Report(10, 100, 1.5, {"a": 1.25, "b": 1.75}, 7.0, 1234.0, 3 << 29, {"a": {"accuracy": 0.5}, "b": {}})


def config(tmp_path, *trackers):
    dump = lambda **_: {"name": "job", "seed": 0}  # noqa: E731
    training = SimpleNamespace(steps=100, lr=0.1)
    return SimpleNamespace(name="job", output=tmp_path, training=training, track=trackers, model_dump=dump)


def test_lines_say_speed_memory_losses_and_scores(tmp_path, capsys):
    with progress.shown(config(tmp_path), World()) as hear:
        hear(REPORT)
        hear(Report(11, 100, 1.0, {}, 8.0, 1.0, 0))
    assert capsys.readouterr().out.splitlines() == [
        "step 10/100  loss 1.5000  a 1.2500  b 1.7500  1234 tokens/s  1.50 GiB  7 s",
        "  a: accuracy 0.500",
        "  b: no test rows",
    ]
    with progress.shown(config(tmp_path), World(rank=1, size=2)) as hear:
        hear(REPORT)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_a_table(tmp_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("rich.live.get_console", lambda: Console(file=out, force_terminal=True, width=140, height=20))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with progress.shown(config(tmp_path), World()) as hear:
        hear(REPORT)
    said = out.getvalue()
    assert all(word in said for word in ("10/100", "1234 tokens/s", "1.50 GiB", "accuracy", "0.500", "1.7500"))


def test_speed_is_of_the_steps_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] = 2.0
    assert clock.step(100) == 50.0
    with clock.paused():
        now[0] = 60.0
    now[0] = 62.0
    assert (clock.step(300), clock.seconds) == (100.0, 4.0)
    for _ in range(progress.SPAN):
        now[0] += 1.0
        latest = clock.step(7)
    assert latest == 7.0


def test_event_files_hold_what_was_reported_and_steps_done_again_count_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for reports in ((1, 2, 3), (2, 3)):
        with progress.shown(config(tmp_path, TensorBoard("curves")), World()) as hear:
            for step in reports:
                hear(Report(step, 4, step / len(reports), {"a": 1.0}, 1.0, 9.0, 5, {"a": {"accuracy": 0.25}}))
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "loss/a", "accuracy/a", "tokens_per_second", "memory_bytes"}
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("loss")] == [(1, 0.3333), (2, 1.0), (3, 1.5)]


def test_trackio_holds_what_was_reported(tmp_path):
    pytest.importorskip("trackio")
    code = """
import sys
from pathlib import Path
from fedpeft.training.config import Checkpoints, Evaluate
from fedpeft.training.trackers import Trackio
log = Trackio("proof", "curves").open("job", Path(sys.argv[1]), {"lr": 0.1}, 1)
log.write(1, {"loss": 2.0}); log.write(2, {"loss": 1.0})
log.close()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=120)
    (file,) = (tmp_path / "curves").glob("*.db")
    with sqlite3.connect(file) as data:
        rows = data.execute("select step, metrics from metrics order by step").fetchall()
    data.close()
    assert [(step, json.loads(values)["loss"]) for step, values in rows] == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize("tracker", [TensorBoard(), Trackio()])
def test_a_tracker_that_is_not_installed_is_refused(tracker, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker.kind, None)
    with pytest.raises(ConfigError, match=rf"{tracker.kind} is not installed; run pip install 'fedpeft\[{tracker.kind}\]'"):
        tracker.check()
    assert TRACKERS[tracker.kind] is type(tracker)


def test_a_job_that_ended_early_has_its_scores_recorded_afterwards(tmp_path):
    folder = tmp_path / "checkpoint"
    settings = SimpleNamespace(steps=9)
    parts = {"output": tmp_path, "state": folder, "training": settings, "tasks": {}, "evaluate": Evaluate(), "checkpoints": Checkpoints()}
    run = SimpleNamespace(tokens=5, losses={}, told={}, started=lambda: None)
    course = Course(SimpleNamespace(**parts), World(), SimpleNamespace(run=run), lambda: {"a": {"accuracy": 0.5}}, None)
    course.step(1, 0.0)
    write(folder, 1)
    course.save(1, "job")
    assert course.final() == {"a": {"accuracy": 0.5}}
    keeper = Keeper(folder, 1, None, HEADLINES)
    assert [(kept.step, kept.scores) for kept in keeper.kept("job")] == [(1, {"a": {"accuracy": 0.5}})]
    assert sorted(path.name for path in folder.iterdir()) == ["kept.json", "state.safetensors", "step-00000001.safetensors"]
