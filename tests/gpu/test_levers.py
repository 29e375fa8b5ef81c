"""The levers of memory and speed on CUDA, on a small random 4-bit Llama: what each one does, and that losses stay what they were."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.bench._random import random_base
from tests.bench.f1_edge_step import InOrder
from tests.bench.k_memory import _data
from tests.gpu.card import DEVICE, MARKS, ON_A_CARD

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.methods import Lora
from fedpeft.tasks.likelihood import packed, token_losses
from fedpeft.training import TrainJob, TrainSettings, train
from fedpeft.training.kernels import fused_kernels
from fedpeft.training.packed import by_sequence

pytestmark = MARKS

PLAIN = TrainSettings(steps=6, batch_size=2, lr=3e-3, precision="bf16", chunked_loss=False, fused_kernels=False)
LIGER = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


@pytest.fixture(scope="module")
def base():
    return random_base("tiny", DEVICE, torch.bfloat16)


def fit(base, settings, checkpoint=None, tokens=2048):
    """Losses of each step, the adapter's values, and the peak of memory in bytes above what is always there."""
    spec = make_spec("bench", base, Lora(r=8, targets=("all",)), InOrder().inner.head)
    losses: list[float] = []
    torch.cuda.empty_cache()
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job = TrainJob(spec.layout.roles, 0, checkpoint, lambda _step, loss: losses.append(loss))
        train(live, InOrder(), _data(base, settings, tokens), settings, job)
        return losses, live.read().flat, torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def plain(base):
    return fit(base, PLAIN)


@pytest.mark.parametrize(
    "lever",
    [
        {"chunked_loss": True},
        {"checkpoint_activations": True},
        {"checkpoint_activations": True, "offload_activations": True},
        {"optimizer": "adamw8bit"},
        pytest.param({"fused_kernels": True}, marks=LIGER),
    ],
    ids=str,
)
def test_a_lever_leaves_the_losses_as_they_are(base, plain, lever):
    losses, values, _ = fit(base, replace(PLAIN, **lever))
    np.testing.assert_allclose(losses, plain[0], rtol=5e-3)
    moved = plain[1] - fit_start(base)
    assert np.linalg.norm(values - plain[1]) < 0.35 * np.linalg.norm(moved)


def fit_start(base):
    spec = make_spec("bench", base, Lora(r=8, targets=("all",)), InOrder().inner.head)
    return initial(base, spec, 0).tensors.flat


@ON_A_CARD
def test_checkpointing_takes_less_memory(base, plain):
    assert fit(base, replace(PLAIN, checkpoint_activations=True))[2] < 0.8 * plain[2]


@ON_A_CARD
def test_what_is_offloaded_is_not_on_the_device_and_comes_back_the_same(base):
    from fedpeft.training.offload import HostStore

    store, values = HostStore(), [torch.randn(1 << 20, device="cuda") for _ in range(4)]
    wanted = [value.cpu() for value in values]
    kept = [store.pack(value) for value in values]
    assert not any(isinstance(one, torch.Tensor) for one in kept)
    del values
    torch.cuda.synchronize()
    for one, value in zip(reversed(kept), reversed(wanted), strict=True):
        assert torch.equal(store.unpack(one).cpu(), value)


def test_a_packed_row_is_its_sequences_alone(base):
    data = _data(base, PLAIN, 100)
    lengths = [100, 37, 1, 80]
    data = replace(data, ids=tuple(ids[:length] for ids, length in zip(data.ids, lengths, strict=False)))
    with torch.no_grad(), by_sequence(base.model):
        whole = token_losses(base.model, packed(data, range(4), 4))
        alone = torch.cat([token_losses(base.model, packed(data, [place], 1)) for place in range(4)])
    torch.testing.assert_close(whole, alone, rtol=2e-2, atol=2e-2)


@LIGER
@ON_A_CARD
def test_norms_gates_and_rotations_run_on_kernels(base):
    import transformers.models.llama.modeling_llama as home

    own = home.apply_rotary_pos_emb
    with fused_kernels(base.model, True):
        layer = base.model.model.layers[0]
        assert all("forward" in module.__dict__ for module in (layer.input_layernorm, layer.mlp, base.model.model.norm))
        assert home.apply_rotary_pos_emb is not own
    assert home.apply_rotary_pos_emb is own
    assert "forward" not in base.model.model.layers[0].mlp.__dict__


def test_a_job_with_moments_of_a_byte_resumes_at_the_same_values(base, tmp_path):
    settings = replace(PLAIN, optimizer="adamw8bit", save_every=1, steps=4)
    _, whole, _ = fit(base, settings, tmp_path / "a")
    seen, again, _ = fit(base, settings, tmp_path / "a")
    assert seen == []
    np.testing.assert_array_equal(whole, again)
