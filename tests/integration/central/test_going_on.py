"""Jobs that are left and gone on with, on other ranks and stages; faults that end all ranks; what is exported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.central.jobs import ENCODER, WORDS
from tests.integration.central.looking import assert_close, losses, values

from fedpeft.central.world import World
from fedpeft.processes import free_port
from fedpeft.training import checkpoint
from fedpeft.training.config import load_central

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1300)]


def exported(folder: Path, name: str, changes: dict[str, str], into: Path) -> dict[str, Any]:
    """Versions by task of what ``central export`` publishes of the job ``name`` without reading rows: the checkpoint's values."""
    from fedpeft.cli.main import run
    from fedpeft.registry import Registry

    tasks = load_central(folder / "job.toml", changes).tasks
    settings = {**changes, "output": str(folder / name), "registry": str(into)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedpeft.central.reading.read_rows", None)
        assert run(["central", "export", "job.toml", *(part for pair in settings.items() for part in ("--set", "=".join(pair)))]) == 0
    versions, held = {version.task: version.manifest for version in Registry(into).list()}, values(folder, name)
    assert versions.keys() == tasks.keys()
    for task in tasks:
        assert (Registry(into).load(task).tensors.flat == held[f"{task}|value"]).all()
        assert versions[task].examples == held[f"(examples)|{task}"] > 10
    return versions


def test_a_job_is_exported_without_its_rows(folder, found, tmp_path):
    versions = exported(folder, "half2", {}, tmp_path)
    assert {manifest.round for manifest in versions.values()} == {4}
    assert sum(manifest.examples for manifest in versions.values()) == 80 - 7 - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("encoder", ENCODER), ("int8", {"base.quantization": "int8", "training.steps": "2"}), ("paired", {"base.model": "t5"})],
)
def test_jobs_on_other_bases_go_on_from_two_ranks_in_stage_3_and_are_exported(folder, more, name, changes, tmp_path):
    whole = more["1.0"][name]
    np.testing.assert_allclose(losses(more["1.0"][f"{name}-resumed"]), losses(whole)[1:], rtol=1e-5)
    assert_close(values(folder, f"{name}-half2"), values(folder, f"{name}1"), 1e-3)
    for manifest in exported(folder, f"{name}-half2", changes, tmp_path).values():
        assert manifest.quantization == ("int8" if name == "int8" else "none",)
        assert manifest.round == len(losses(whole))


def test_two_ranks_go_on_from_one_and_one_from_two_with_rows_on_disk_under_a_file_of_the_users_own(folder, found):
    undisturbed = losses(found["1.0"]["stage0"])
    for world, name in (("2.0", "half1"), ("1.0", "half2")):
        resumed = losses(found[world]["resumed"])
        assert len(resumed) == 2
        np.testing.assert_allclose(resumed, undisturbed[2:], atol=2e-6, rtol=2e-6)
        assert_close(values(folder, name), values(folder, "one0"), 1e-4)
        assert len(list((folder / name / "encoded").iterdir())) == len(WORDS)


def test_one_job_at_a_time_has_an_output(found):
    fault = found["1.0"]["taken"]
    assert fault["code"] == 9
    assert "trains a job there; stop it, or give this one another `output`" in fault["fault"]


def test_a_job_of_other_settings_is_not_resumed(folder, found):
    fault = found["1.0"]["changed"]
    assert (fault["code"], "of step 1, is of other settings" in fault["fault"]) == (3, True), fault


def test_a_full_disk_ends_the_job_with_its_exit_code_and_leaves_the_last_checkpoint(folder, found):
    fault = found["1.0"]["full"]
    assert (fault["code"], "free space" in fault["fault"]) == (9, True), fault
    held = checkpoint.read(folder / "full1" / "checkpoint")
    assert held is not None
    assert held.tally.step == 1
    assert [path.name for path in (folder / "full1" / "checkpoint").iterdir() if path.name.startswith(".new")] == []


def test_a_fault_of_one_rank_ends_all_with_its_exit_code(found):
    for rank, said in (("2.0", "rank 1: "), ("2.1", "nowhere.jsonl")):
        fault = found[rank]["missing"]
        assert (fault["code"], said in fault["fault"]) == (4, True), fault
        assert fault["seconds"] < 30
        other = found[rank]["other"]
        assert (other["code"], "same files" in other["fault"]) == (4, True), other
    assert found["1.0"]["diverged"]["code"] == 11


def cli(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "fedpeft", "central", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    log = (folder / f"cli-{arguments[0]}.log").open("ab")
    return subprocess.Popen(command, cwd=folder, env=environment | settings, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_kill_9_of_a_rank_ends_the_job_and_the_same_command_finishes_it(folder, found):
    started = cli(folder, "train", "job.toml", "--ranks", "2", "--set", "training.save_every=1", "--set", "deepspeed.stage=1")
    end = time.monotonic() + 120
    while not (folder / "out" / "checkpoint").is_dir() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(children(started.pid)[1], signal.SIGKILL)
    assert started.wait(60) == 8
    done = checkpoint.read(folder / "out" / "checkpoint")
    assert done is not None
    one = World(port=free_port()).environment()
    arguments = ("--launcher", "torchrun", "--set", "training.save_every=1", "--set", "deepspeed.stage=0")
    assert cli(folder, "resume", "job.toml", *arguments, **one).wait(120) == 0
    assert_close(values(folder, "out"), values(folder, "one0"), 1e-4)
    from fedpeft.registry import Registry

    published = Registry(folder / "registry").list()
    assert {version.task for version in published} == {"animals", "colours"}
    assert all(version.manifest.scheme == "central" and version.manifest.metrics["perplexity"] > 1 for version in published)


@pytest.mark.slow
def test_the_command_answers_9_where_nothing_can_be_written(folder, found):
    settings = ("output=bare", "training.save_every=1", "deepspeed.stage=0", "track=tensorboard", "evaluate.every=1")
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-W", "ignore", "-m", "fedpeft", "central", "train", "job.toml"]
    command = [*limited, "--launcher", "torchrun", *(part for setting in settings for part in ("--set", setting))]
    one = World(port=free_port()).environment()
    done = subprocess.run(command, cwd=folder, env=os.environ | one, capture_output=True, text=True, timeout=200)
    assert (done.returncode, "free space" in done.stderr) == (9, True), done.stderr
    assert "animals.safetensors: cannot be written" in done.stderr  # the router card, which comes before the first step
