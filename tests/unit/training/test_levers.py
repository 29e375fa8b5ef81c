"""The levers of memory and speed: each off or on, a job ends where it would, and resumes at the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedpeft.errors import ConfigError
from fedpeft.training import TrainJob, TrainSettings, train
from fedpeft.training import checkpoint as disk
from fedpeft.training.kernels import fused_kernels, tensor_cores
from fedpeft.training.offload import HostStore, checkpointer

BOTH = frozenset({"A", "B"})
BYTES = TrainSettings(steps=12, batch_size=4, lr=0.02, optimizer="adamw8bit", save_every=1)


def wide_data(width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(24, 2, width)).astype(np.float32))


def test_moments_of_a_byte_come_near_those_of_four_bytes_and_take_a_third(toy_live, toy_task, tmp_path):
    width = 2048  # bitsandbytes keeps what has fewer than 4096 values in float32
    found = {}
    for optimizer in ("adamw", "adamw8bit"):
        live = toy_live(width)
        start = live.flat.clone()
        folder = tmp_path / optimizer
        result = train(live, toy_task(), wide_data(width), replace(BYTES, optimizer=optimizer), TrainJob(BOTH, 1, folder))
        found[optimizer] = live.flat - start, result.loss, sum(path.stat().st_size for path in folder.iterdir())
    moved, loss, size = found["adamw8bit"]
    exact, exact_loss, exact_size = found["adamw"]
    assert float((moved - exact).norm() / exact.norm()) < 0.1
    assert math.isclose(loss, exact_loss, rel_tol=0.02)
    values = 4 * moved.numel()  # beside them two tables of 256 codes a role
    assert size - values < 0.35 * (exact_size - values)


def test_a_job_with_moments_of_a_byte_resumes_at_the_same_bits(toy_live, toy_task, tmp_path):
    class Killed(Exception):
        pass

    def killed(step: int, _loss: float) -> None:
        if step == 7:
            raise Killed

    whole = toy_live(2048)
    train(whole, toy_task(), wide_data(2048), BYTES, TrainJob(BOTH, 1))
    with pytest.raises(Killed):
        train(toy_live(2048), toy_task(), wide_data(2048), BYTES, TrainJob(BOTH, 1, tmp_path, killed))
    again = toy_live(2048)
    assert train(again, toy_task(), wide_data(2048), BYTES, TrainJob(BOTH, 1, tmp_path)).resumed_from == 6
    assert torch.equal(again.flat, whole.flat)
    disk.clear(tmp_path)


def test_what_checkpointing_keeps_on_a_cpu_is_not_copied():
    store, value = HostStore(), torch.ones(4)
    assert store.unpack(store.pack(value)) is value


@pytest.mark.parametrize("offload", [False, True])
def test_the_checkpointer_computes_again_what_it_did_not_keep(offload):
    layer, calls = nn.Linear(3, 3), []
    x = torch.randn(2, 3, requires_grad=True)

    def run(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.tanh(layer(value))

    found = torch.autograd.grad(checkpointer(offload)(run, x).sum(), [x, layer.weight])
    assert len(calls) == 2
    wanted = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sum(), [x, layer.weight])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_without_cuda_no_module_gets_another_forward():
    model = nn.Sequential(nn.Linear(2, 2))
    with fused_kernels(model, True):
        assert "forward" not in model[0].__dict__


def test_tensor_cores_are_as_before_afterwards():
    before = torch.get_float32_matmul_precision()
    with tensor_cores(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_offload_without_checkpointing_and_momentum_of_adam_are_refused():
    with pytest.raises(ConfigError, match="offload_activations"):
        TrainSettings(offload_activations=True)
    with pytest.raises(ConfigError, match="momentum"):
        TrainSettings(optimizer="adamw8bit", momentum=0.9)


@pytest.mark.filterwarnings("ignore")
def test_the_memory_benchmark_runs_without_cuda_and_counts_what_is_known():
    from tests.bench import k_memory
    from tests.bench._bound import flop_per_token
    from tests.bench._random import random_base

    assert flop_per_token("7B", False, k_memory.SEQUENCE["7B"]) == pytest.approx(28.0e9, rel=0.01)
    assert flop_per_token("8B", True, k_memory.SEQUENCE["8B"]) == pytest.approx(47.2e9, rel=0.03)
    base = random_base("tiny", "cpu")
    lean, plain = (k_memory.ours(base, replace(k_memory.LEAN, steps=4, **more), 16) for more in ({}, {"chunked_loss": False}))
    assert lean.speed > 0
    assert lean.loss == pytest.approx(plain.loss, rel=1e-5)
