"""What is decided before any rank starts: DeepSpeed's JSON, who the ranks are, and how they are started and watched."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import get_args

import pytest

from fedpeft.bases import BaseSpec
from fedpeft.bases.spec import Quantization
from fedpeft.central import launch
from fedpeft.central.estimate.recommending import places, settings_of
from fedpeft.central.launch import Rank, first_node, here, hosts, slurm, supervise
from fedpeft.central.world import World
from fedpeft.central.zero import offload_of, sized, stage_of, zero_json, zero_of
from fedpeft.errors import ConfigError
from fedpeft.training.config import DeepSpeed
from fedpeft.training.settings import Optimizer, TrainSettings

SETTINGS = TrainSettings(batch_size=8, accumulate=2, clip=0.5)


def own(folder, table):
    path = folder / "ds.json"
    path.write_text(json.dumps(table))
    return DeepSpeed(stage=2, config=path)


def test_the_json_says_what_the_toml_says():
    table = zero_json(DeepSpeed(stage=3, offload="cpu"), SETTINGS, 4)
    assert table["train_micro_batch_size_per_gpu"] * 4 == SETTINGS.batch_size
    assert (table["gradient_accumulation_steps"], table["gradient_clipping"], stage_of(table)) == (2, 0.5, 3)
    assert table["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_the_users_file_wins_where_it_does_not_contradict(tmp_path):
    file = own(tmp_path, {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5}, "gradient_clipping": "auto", "train_batch_size": 16})
    table = zero_json(file, SETTINGS, 2)
    assert table["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 5}
    assert table["gradient_clipping"] == 0.5
    beside = zero_json(own(tmp_path, {"zero_optimization": {"reduce_bucket_size": 5}}), SETTINGS, 2)
    assert beside["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0 contradicts training.clip, which makes it 0.5"),
        ({"train_batch_size": 8}, "contradicts training.batch_size, which makes it 16"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "contradicts training.optimizer"),
        ({"bf16": {"enabled": True}}, "contradicts training.precision"),
        ({"fp16": {"enabled": True}}, "contradicts training.precision"),
        ({"scheduler": {"type": "WarmupLR"}}, "contradicts training.schedule"),
        ({"checkpoint": {"load_universal": True}}, "'checkpoint' is decided by our own checkpoints"),
        ({"zero_optimization": {"stagee": 3}}, "zero_optimization has no key 'stagee' that a job may set"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "ratio": 0.5}}}, "offload_param has no key 'ratio'"),
        ({"zero_optimization": 3}, "zero_optimization = 3: must be an object"),
        ({"zero_optimization": {"stage": "three"}}, 'stage = "three": must be 0, 1, 2 or 3'),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 'offload_param.device = "cpu" needs stage 3 or more, stage is 2'),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "needs nvme_path"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "must be none, cpu or nvme"),
        ([], "is an object"),
    ],
)
def test_unknown_and_contradictory_keys_are_refused(tmp_path, table, said):
    with pytest.raises(ConfigError, match=said):
        zero_json(own(tmp_path, table), SETTINGS, 2)


def test_a_table_of_fp16_says_what_our_loss_scaling_does_or_is_refused(tmp_path):
    usual = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
    half = replace(SETTINGS, precision="fp16")
    for settings, table in ((half, usual), (half, {"enabled": True}), (SETTINGS, usual), (SETTINGS, {"enabled": False, "loss_scale": 8})):
        assert "fp16" not in zero_json(own(tmp_path, {"fp16": table}), settings, 2)  # DeepSpeed's own would hold the adapters in fp16
    for table in ({"enabled": False}, {"loss_scale": 128}, {"initial_scale_power": 12}, {"loss_scale_window": 50}):
        with pytest.raises(ConfigError, match=r"contradicts training\.precision"):
            zero_json(own(tmp_path, {"fp16": table}), half, 2)


def test_all_faults_of_the_users_file_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as fault:
        zero_json(own(tmp_path, {"a": 1, "b": 2, "gradient_clipping": 9}), SETTINGS, 1)
    assert len(str(fault.value).splitlines()) == 3


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="8 examples cannot be divided among 3 ranks; set a multiple of 3, for example 9"):
        zero_json(DeepSpeed(), SETTINGS, 3)


@pytest.mark.parametrize(
    ("kind", "place", "said"), [("nf4", "cpu", "codes are divided only once"), ("none", "nvme", "DeepSpeed swaps bf16 alone")]
)
def test_a_base_that_cannot_lie_where_parameters_go_is_refused(kind, place, said):
    speed = DeepSpeed(stage=3, offload_params=place, nvme="swap" if place == "nvme" else None)
    job = SimpleNamespace(deepspeed=speed, training=SETTINGS, base=BaseSpec("model", kind))
    with pytest.raises(ConfigError, match=said):
        zero_of(job, 2)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("kind", get_args(Quantization))
def test_what_an_estimate_may_advise_is_not_refused(kind, optimizer):
    for place in places(kind, optimizer):
        job = SimpleNamespace(deepspeed=settings_of(place), training=replace(SETTINGS, optimizer=optimizer), base=BaseSpec("model", kind))
        assert stage_of(zero_of(job, 2)) == place[0]


def test_a_bucket_is_no_larger_than_what_trains():
    table = zero_json(DeepSpeed(stage=2), SETTINGS, 2)
    assert sized(table, 1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert sized(table, 1 << 40)["zero_optimization"] == table["zero_optimization"]


def test_settings_of_no_meaning_here_are_refused():
    with pytest.raises(ConfigError, match="proximal"):
        zero_json(DeepSpeed(), replace(SETTINGS, proximal=0.1), 2)


def test_moments_of_a_byte_lie_on_the_gpu_or_in_host_memory(tmp_path):
    settings = replace(SETTINGS, optimizer="adamw8bit")
    for stage in range(4):
        assert zero_json(DeepSpeed(stage=stage), settings, 2)["zero_optimization"]["stage"] == stage
    assert offload_of(zero_json(DeepSpeed(stage=2, offload="cpu"), settings, 2)["zero_optimization"], "optimizer") == "cpu"
    with pytest.raises(ConfigError, match="'adamw8bit' and optimizer states offloaded to 'nvme'"):
        zero_json(DeepSpeed(stage=3, offload="nvme", nvme=tmp_path), settings, 2)
    with pytest.raises(ConfigError, match=r"contradicts training\.optimizer"):
        zero_json(own(tmp_path, {"optimizer": {"type": "AdamW"}}), settings, 2)


def test_a_world_is_what_a_launcher_set_and_half_of_it_is_refused():
    world = World(1, 1, 2, "10.0.0.1", 5)
    assert World.of(world.environment()) == world
    assert World.of({"PATH": "x", "MASTER_ADDR": "y"}) is None
    with pytest.raises(ConfigError, match=r"\['LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'\] are not"):
        World.of({"RANK": "0"})
    with pytest.raises(ConfigError, match="no whole numbers"):
        World.of(world.environment() | {"RANK": "one"})


def test_slurm_and_host_files(tmp_path, monkeypatch):
    step = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1"}
    assert slurm(step) == World(5, 1, 8, "gpu03", launch.PORT)
    assert [first_node(nodes) for nodes in ("a1,a2", "n[1,3]", "solo")] == ["a1", "n1", "solo"]
    with pytest.raises(ConfigError, match="SLURM_PROCID"):
        slurm({})
    file = tmp_path / "hosts"
    file.write_text("# two machines\nme@a slots=2\n\nb\n")
    found = hosts(file)
    assert [(rank.host, rank.world.rank, rank.world.local_rank) for rank in found] == [("me@a", 0, 0), ("me@a", 1, 1), ("b", 2, 0)]
    assert {(rank.world.size, rank.world.address) for rank in found} == {(3, "a")}
    monkeypatch.setenv("PYTHONPATH", "/with space")
    line = found[2].command(["job.toml", "--set", "a=b c"])
    assert line[:2] == ["ssh", "-o"]
    assert all(part in line[-1] for part in ("RANK=2", "MASTER_ADDR=a", "'PYTHONPATH=/with space'", "central rank job.toml", "'a=b c'"))
    for text in ("", "a slots=x", "a b c"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="hostfile"):
            hosts(file)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda:0"), (4, "cuda:3")])
def test_a_rank_has_the_gpu_of_its_number_or_the_only_one_it_sees(monkeypatch, gpus, device):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert World(rank=7, local_rank=3, size=8).device == device


@dataclass(frozen=True)
class Script:
    """A rank that runs a line of Python."""

    world: World
    code: str

    def command(self, arguments):
        return [sys.executable, "-c", self.code]


def test_the_first_failure_ends_all_ranks_with_its_code():
    world = World()
    assert supervise([Script(world, "pass"), Script(world, "pass")], []) == 0
    began = time.monotonic()
    slow = "import time; time.sleep(60)"
    assert supervise([Script(world, slow), Script(world, "raise SystemExit(11)")], [], grace=0.3) == 11
    assert supervise([Script(world, slow), Script(world, "import os; os.kill(os.getpid(), 9)")], [], grace=0.3) == 8
    assert time.monotonic() - began < 20


def test_ranks_on_this_machine_share_a_port_and_number_through():
    found = here(3)
    assert [(rank.world.rank, rank.world.local_rank, rank.world.size, rank.host) for rank in found] == [(i, i, 3, None) for i in range(3)]
    assert len({rank.world.port for rank in found}) == 1
    assert isinstance(found[0], Rank)
    with pytest.raises(ConfigError, match="--ranks 0"):
        here(0)
