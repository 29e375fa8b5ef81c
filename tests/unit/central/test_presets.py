"""The files under deploy/ for central jobs: each fits the machine that it names, and says nothing that DeepSpeed or we would not take."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from fedpeft.central.estimate import Room, estimated, plan_of
from fedpeft.central.launch import hosts
from fedpeft.central.zero import zero_of
from fedpeft.central.zero_keys import OFFLOAD, STAGE
from fedpeft.training.config import load_central

DEPLOY = Path(__file__).parents[3] / "deploy"
JOBS = sorted(path.stem for path in (DEPLOY / "jobs").glob("*.toml"))
QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False}
SIZES = {
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 7.62),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 48, 40, 8, 13824, 14.77),
    "Qwen/Qwen2.5-32B-Instruct": (5120, 64, 40, 8, 27648, 32.76),
    "Qwen/Qwen2.5-72B-Instruct": (8192, 80, 64, 8, 29568, 72.71),
}
"""Hidden size, layers, heads, key heads, width of the MLP, and the billions of parameters that the models' cards give."""
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
NEEDS = re.compile(r"on (?P<ranks>\d+) GPUs? of (?P<gpu>\d+) GiB, with (?P<host>\d+) GiB of host memory")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_fits_what_its_first_line_says(tmp_path, name):
    path = DEPLOY / "jobs" / f"{name}.toml"
    model = load_central(path).base.model
    (tmp_path / "config.json").write_text(json.dumps(QWEN | dict(zip(NAMES, SIZES[model], strict=False))))
    job, said = load_central(path, {"base.model": str(tmp_path)}), NEEDS.search(path.read_text().splitlines()[0])
    assert said is not None
    ranks = int(said["ranks"])
    estimate, table = estimated(job, ranks), zero_of(job, ranks)
    assert sum(count for count, _ in estimate.weights.sizes) / 1e9 == pytest.approx(SIZES[model][-1], abs=0.01)
    plan = plan_of(estimate, table)
    assert Room(int(said["gpu"]) << 30, int(said["host"]) << 30, ranks).holds(plan)
    own = json.loads(job.deepspeed.config.read_text())["zero_optimization"]
    assert own.items() <= table["zero_optimization"].items()
    if plan.stage == 3:  # less would not do
        assert not Room(int(said["gpu"]) << 30).holds(plan_of(estimate, {"zero_optimization": {"stage": 2}}))


def test_every_key_is_one_of_deepspeeds(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Zero
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as Optimizer
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Param

    assert {field.alias or name for name, field in Zero.model_fields.items()} >= STAGE
    assert set(Param.model_fields) >= OFFLOAD["offload_param"]
    assert set(Optimizer.model_fields) >= OFFLOAD["offload_optimizer"]
    for path in (DEPLOY / "deepspeed").glob("*.json"):
        Zero(**json.loads(path.read_text())["zero_optimization"])


def test_scripts_for_clusters_start_jobs_that_are_here():
    assert subprocess.run(["bash", "-n", str(DEPLOY / "slurm" / "train.sbatch")], check=False).returncode == 0
    assert [rank.host for rank in hosts(DEPLOY / "hostfile")] == ["gpu01.example.org"] * 8 + ["trainer@gpu02.example.org"] * 8
    job = yaml.safe_load((DEPLOY / "kubernetes" / "trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    path = next(word for word in trainer["command"] if word.endswith(".toml"))
    assert Path(path).stem in JOBS
    assert trainer["numProcPerNode"] == int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == 8
    mounts = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    volumes, containers = mounts["spec"]["volumes"], mounts["spec"]["containers"]
    assert {volume["name"] for volume in volumes} == {mount["name"] for mount in containers[0]["volumeMounts"]}
