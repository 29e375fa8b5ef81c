"""The central job's TOML, and the mixing rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.bases import BaseSpec
from fedpeft.errors import ConfigError
from fedpeft.methods import Lora
from fedpeft.training.config import load_central
from fedpeft.training.mixing import Equal, Explicit, Proportional, Temperature
from fedpeft.training.settings import TrainSettings

EXAMPLE = Path(__file__).parents[3] / "deploy" / "configs" / "central.toml"
SMALL = """
name = "small"
output = "out"
base = { model = "minilm" }

[tasks.spam]
kind = "classification"
labels = ["ham", "spam"]
data = { path = "spam.jsonl" }
"""


def write(folder: Path, text: str) -> Path:
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def test_the_example_loads():
    job = load_central(EXAMPLE)
    assert job.method == Lora()
    assert job.base == BaseSpec("minilm", max_tokens=128)
    assert job.training.lr_by_role == {"head": 1e-3}
    assert job.mixing == Temperature(2.0)
    assert all(entry.task.name == name and entry.data.package == "stdlib" for name, entry in job.tasks.items())
    assert job.output == EXAMPLE.parent / "central-run"


def test_defaults_and_paths_beside_the_file(tmp_path):
    job = load_central(write(tmp_path, 'deepspeed = "ds.json"\n' + SMALL))
    assert job.training == TrainSettings()
    assert job.mixing == Proportional()
    assert job.tasks["spam"].task.labels == ("ham", "spam")
    assert (job.output, job.registry, job.deepspeed.config) == (tmp_path / "out", None, tmp_path / "ds.json")


def test_overrides_of_the_command_line(tmp_path):
    assert load_central(write(tmp_path, SMALL), {"training.steps": "7"}).training.steps == 7


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("[training]\nstep = 3", r"training: .*unknown keys \['step'\]; known keys are \['steps'"),
        ("[training]\nsteps = 0\nlr = -1", r"training.steps: .*greater than or equal to 1 \(got 0\); training.lr: .*greater than 0"),
        ("[training]\nlr_by_role = { B = 0 }", r"training.lr_by_role.B: .*greater than 0"),
        ("[deepspeed]\nstage = 4", r"deepspeed.stage: .*\(got 4\)"),
        ('[deepspeed]\nstage = 1\noffload = "cpu"', r"offload = 'cpu' needs stage 2 or 3, stage is 1"),
        ('[deepspeed]\nstage = 3\noffload = "nvme"', "nvme is the folder"),
        ("[evaluate]\nevery = 0", r"evaluate.every: .*greater than or equal to 1"),
        ('[checkpoints]\nbest = "mean"', r"save_every is 10 steps, evaluate.every is None; make save_every a multiple"),
        ('[evaluate]\nevery = 4\n[checkpoints]\nbest = "spam"', r"evaluate.every is 4"),
        ('[checkpoints]\nbest = "ham"', r"give 'mean', 'worst' or one of the tasks \['spam'\]"),
        (
            "[evaluate]\nevery = 5\n[checkpoints]\nbest = 'worst'\n[tasks.story]\nkind = 'generation'\nmetrics = ['perplexity']\n"
            "data = { path = 'story.jsonl' }",
            r"less is better of the first metric of \['story'\]",
        ),
        ('[track]\nkind = "wandb"', r"unknown kind 'wandb'; known kinds are \['tensorboard', 'trackio'\]"),
        ('[mixing]\nkind = "even"', r"unknown kind 'even'; known kinds are \['equal', 'explicit'"),
        ('[mixing]\nkind = "temperature"\ntemperature = 0.5', "greater than or equal to 1"),
        ('[mixing]\nkind = "explicit"\nweights = { ham = 1.0 }', r"names \['ham'\], the tasks are \['spam'\]"),
        ('[method]\nkind = "lora"\nrank = 4', r"unknown keys \['rank'\]; known keys are \['r',"),
        ("[surprise]", "surprise: unknown key"),
    ],
)
def test_faults_are_named(tmp_path, extra, message):
    with pytest.raises(ConfigError, match=message):
        load_central(write(tmp_path, SMALL + extra))


def test_all_faults_at_once(tmp_path):
    with pytest.raises(ConfigError) as fault:
        load_central(
            write(tmp_path, SMALL.replace('"minilm"', '"minilm", quantization = "int3"') + "[training]\nsteps = 0\n[deepspeed]\nstage = 9")
        )
    assert len(str(fault.value).splitlines()) == 3
    assert "int3" in str(fault.value)


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 10**9), min_size=1, max_size=6), st.floats(1.0, 50.0))
def test_shares_sum_to_one_and_temperature_flattens(sizes, temperature):
    flat = Temperature(temperature).shares(sizes)
    for shares in (flat, Proportional().shares(sizes), Equal().shares(sizes), Explicit({task: 2.0 for task in sizes}).shares(sizes)):
        assert sum(shares.values()) == pytest.approx(1.0)
    assert Temperature(1.0).shares(sizes) == pytest.approx(Proportional().shares(sizes))
    assert max(flat.values()) <= max(Proportional().shares(sizes).values()) + 1e-12


def test_shares_as_computed_by_hand():
    assert Temperature(2.0).shares({"a": 100, "b": 900}) == pytest.approx({"a": 0.25, "b": 0.75})
    assert Equal().shares({"a": 1, "b": 0}) == {"a": 1.0, "b": 0.0}
    assert Explicit({"a": 3, "b": 1}).shares({"a": 9, "b": 9}) == {"a": 0.75, "b": 0.25}
    assert Proportional().shares({"a": 0}) == {"a": 0.0}


def test_settings_and_schema_need_no_torch():
    code = "import sys, fedpeft.training, fedpeft.training.config; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_relative_paths_are_relative_to_the_file(tmp_path):
    settings = {"base.model": "./model", "tasks.area.data": '{ path = "rows.jsonl" }', "tasks.error.data": '{ path = "/rows.jsonl" }'}
    (tmp_path / "job.toml").write_text(EXAMPLE.read_text())
    job = load_central(tmp_path / "job.toml", settings)
    assert job.base.model == str(tmp_path / "model")
    assert [entry.data.path for entry in job.tasks.values()] == [str(tmp_path / "rows.jsonl"), "/rows.jsonl"]
    assert (job.state, job.registry) == (tmp_path / "central-run" / "checkpoint", tmp_path / "central-registry")
    assert load_central(EXAMPLE).base.model == "minilm"


def test_conflicts_need_something_shared_and_patience_a_metric_of_the_task():
    ends = load_central(EXAMPLE, {"validation.patience": "2", "validation.metric": '{ area = "macro_f1", error = "loss" }'})
    assert ends.patience_metrics == {"area": "macro_f1"}
    found = load_central(EXAMPLE, {"balance": "coba", "shared": "true", "conflicts": "pcgrad"})
    assert (found.balance.kind, found.looks, found.conflicts) == ("coba", True, "pcgrad")
    faults = {
        "conflicts = 'pcgrad'": {"conflicts": "pcgrad"},
        "nothing ends early by it": {"validation.metric": "accuracy"},
        "names 'aera', the tasks are": {"validation": '{ patience = 1, metric = { aera = "accuracy" } }'},
        r"task area has metrics .*add it to tasks.area.metrics": {"validation": '{ patience = 1, metric = "rouge_l" }'},
        "coba: unknown keys": {"balance": '{ kind = "coba", window = 3 }'},
        "known kinds are": {"balance": "gradnorm"},
    }
    for said, change in faults.items():
        with pytest.raises(ConfigError, match=said):
            load_central(EXAMPLE, change)
