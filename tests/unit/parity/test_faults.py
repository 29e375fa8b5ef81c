"""A user's mistakes with `fedpeft parity`: one line, the documented exit code, and nothing deleted that is not a run's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from fedpeft.cli.main import run
from fedpeft.errors import ConfigError, DataError, FedpeftError, StorageError, UpdateError, kind_of
from fedpeft.parity import drive, figures, fitting
from fedpeft.parity.children import lines, start
from fedpeft.parity.plan import Plan


def said(capsys, arguments: list[str], code: int) -> str:
    assert run(["parity", *arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("fedpeft: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("changed", "words", "code"),
    [
        ({"mood": "clusters = 2"}, "tasks.mood.clusters", ConfigError.exit_code),
        ({"mood": "training = { stepps = 3 }"}, "stepps", ConfigError.exit_code),
        ({"more": 'start = "pissa"'}, "start", ConfigError.exit_code),
        ({"base": "max_tokens = 0"}, "max_tokens", 5),
    ],
)
def test_files_that_cannot_be_compared(capsys, files, tmp_path, changed, words, code) -> None:
    assert words in said(capsys, [str(files(**changed)), "--out", str(tmp_path / "run")], code)
    assert not (tmp_path / "run").exists()


def test_sites_that_are_not_there(capsys, files, tmp_path) -> None:
    federation, out = files(), ["--out", str(tmp_path / "run")]
    north = str(federation.parent / "north.toml")
    assert "no such file" in said(capsys, ["absent.toml"], ConfigError.exit_code)
    assert "min_sites = 2" in said(capsys, [str(federation), north, *out], ConfigError.exit_code)
    assert not (tmp_path / "run").exists()
    assert "twice" in said(capsys, [str(federation), north, north, *out], ConfigError.exit_code)
    (tmp_path / "alone").mkdir()
    alone = federation.rename(tmp_path / "alone" / "federation.toml")
    assert "SITE.TOML" in said(capsys, [str(alone), *out], ConfigError.exit_code)
    west = str(federation.parent / "west.toml")
    assert "tasks.mood" in said(capsys, [str(alone), west, *out], ConfigError.exit_code)


def test_rows_that_are_not_there_are_found_before_anything_starts(capsys, files, tmp_path) -> None:
    federation = files()
    (federation.parent / "south-mood.jsonl").unlink()
    err = said(capsys, [str(federation), "--engine", "local", "--out", str(tmp_path / "run")], DataError.exit_code)
    assert "site south, task mood" in err


def test_a_folder_of_something_else_is_left_alone(capsys, files, tmp_path) -> None:
    federation, thesis = files(), tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("dear")
    for more in ([], ["--fresh"]):
        assert "nothing was touched" in said(capsys, [str(federation), "--out", str(thesis), *more], ConfigError.exit_code)
    assert [path.name for path in thesis.iterdir()] == ["chapter.txt"]


def test_a_folder_that_another_run_is_at_work_in_is_refused(capsys, files, tmp_path) -> None:
    federation, out = files(), tmp_path / "run"
    with drive.prepared(drive.Request(federation, (), out, "local"), drive.beside(federation), "local"):
        for more in ([], ["--fresh"]):
            err = said(capsys, [str(federation), "--out", str(out), "--engine", "local", *more], StorageError.exit_code)
            assert f"process {os.getpid()} runs fedpeft parity there" in err
        assert (out / drive.STAMP).exists()


def test_a_folder_of_another_run_is_not_gone_on_with(files, tmp_path) -> None:
    quiet, out = Console(quiet=True), tmp_path / "run"
    request = drive.Request(files(), (), out, "local")
    sites = drive.beside(request.federation)
    with drive.prepared(request, sites, "local"):
        pass
    (out / "local.json").write_text("{}")
    with drive.prepared(request, sites, "local"):
        pass
    files(more='scheme = { kind = "fedavg" }')
    for engine in ("local", "deepspeed"):
        with pytest.raises(ConfigError, match="--fresh"), drive.prepared(request, sites, engine):
            pass
    assert (out / "local.json").exists()
    with drive.prepared(drive.Request(request.federation, (), out, "local", fresh=True), sites, "local"):
        pass
    assert not (out / "local.json").exists()
    assert 'kind = "fedavg"' in (out / "federation.toml").read_text()
    with pytest.raises(ConfigError, match="--engine magic"):
        drive.chosen(Plan.read(request.federation), "magic", quiet)
    with pytest.raises(StorageError, match="run the same command again"):
        figures.collect(Plan.read(request.federation), out)


def test_without_deepspeed_the_local_engine_trains_and_says_so(files, monkeypatch, capsys) -> None:
    plan = Plan.read(files())
    monkeypatch.setattr(drive.joint, "find_spec", lambda _name: None)
    assert drive.chosen(plan, "auto", Console(width=200)) == "local"
    assert "DeepSpeed is not installed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not installed"):
        drive.chosen(plan, "deepspeed", Console(quiet=True))


def test_a_child_ends_its_parent_with_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("of an earlier start\n")
    child = start("local", ["fedpeft", "parity-arm", str(tmp_path), "local"], tmp_path / "log")
    with pytest.raises(ConfigError, match=r"local ended with exit code 3: .*federation.toml: no such file"):
        list(lines(child, 20))
    child = start("local", ["timeit", "-n1", "-r1", "import os; print('  one', flush=True); os.kill(os.getpid(), 9)"], tmp_path / "log")
    told = lines(child, (tmp_path / "log").stat().st_size)
    assert next(told) == "  one"
    with pytest.raises(FedpeftError, match=r"local was ended by signal 9.*last words:   one"):
        list(told)
    assert kind_of(UpdateError.exit_code) is UpdateError
    assert kind_of(70) is None


def test_what_was_scored_is_not_trained_again(tmp_path: Path) -> None:
    asked: list[Path] = []

    def work(place: Path) -> float:
        asked.append(place)
        return 0.5

    assert [fitting.kept(tmp_path / "t-s", work) for _ in range(2)] == [0.5, 0.5]
    assert asked == [tmp_path / "t-s"]
    assert json.loads((tmp_path / "t-s.json").read_text()) == 0.5
