"""fp16 on CUDA, as cards without units for bf16 train: losses near fp32's, overflows, resumption; and 8-bit moments under ZeRO."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.bench._random import random_base
from tests.bench.f1_edge_step import InOrder
from tests.bench.k_memory import _data
from tests.gpu.card import DEVICE, MARKS, ON_A_CARD

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.bases.quantize import compute_dtype, multiplies_bf16
from fedpeft.methods import Lora
from fedpeft.training import TrainJob, TrainSettings, checkpoint, scaling, train
from fedpeft.training.dp import DpEngine
from fedpeft.training.scaling import KEY

pytestmark = MARKS

FP32 = TrainSettings(steps=6, batch_size=2, lr=3e-3, fused_kernels=False)
FP16 = replace(FP32, precision="fp16")
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def base():
    """Codes that are made dense in fp16, and the rest in it."""
    return random_base("tiny", DEVICE, torch.float16)


def fit(base, settings, folder=None, engine=None, tokens=512):
    """Losses of each step, the result, and the adapter's values."""
    spec = make_spec("bench", base, Lora(r=8, targets=("all",)), InOrder().inner.head)
    losses: list[float] = []
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        job = TrainJob(spec.layout.roles, 0, folder, lambda _step, loss: losses.append(loss))
        result = train(live, InOrder(), _data(base, settings, tokens), settings, job, engine)
        return losses, result, live.read().flat


@pytest.fixture(scope="module")
def plain(base):
    """fp32 adapters on the base in fp16: scaled too."""
    return fit(base, FP32)


@pytest.mark.parametrize("lever", [{}, {"checkpoint_activations": True}, {"chunked_loss": False}, {"fused_kernels": True}], ids=str)
def test_fp16_trains_as_fp32_does(base, plain, lever):
    losses, result, values = fit(base, replace(FP16, **lever))
    start = initial(base, make_spec("bench", base, Lora(r=8, targets=("all",)), InOrder().inner.head), 0).tensors.flat
    assert result.skipped < FP16.steps / 2
    assert np.isfinite(values).all()
    if not result.skipped:
        np.testing.assert_allclose(losses, plain[0], rtol=5e-3)
        assert np.linalg.norm(values - plain[2]) < 0.35 * np.linalg.norm(plain[2] - start)


def test_steps_that_overflow_are_left_out_until_the_scale_fits(base, plain, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "START", 2.0**36)
    settings = replace(FP16, steps=24, save_every=1)
    losses, result, values = fit(base, settings, tmp_path)
    assert 0 < result.skipped < 24
    assert np.isfinite(losses).all()
    assert np.isfinite(values).all()
    held = checkpoint.read(tmp_path)
    assert held is not None
    assert held.arrays[KEY][0] == 2.0 ** (36 - result.skipped)


def test_a_scaled_job_goes_on_at_the_same_bits(base, tmp_path):
    settings = replace(FP16, save_every=1)
    _, _, whole = fit(base, settings, tmp_path)
    seen, result, again = fit(base, settings, tmp_path)
    assert (seen, result.resumed_from) == ([], settings.steps)
    np.testing.assert_array_equal(whole, again)


def test_private_steps_clip_gradients_that_are_not_scaled(base):
    """All examples are drawn, none is clipped, and there is next to no noise: a scale that was left in would show."""
    engine = DpEngine(noise_multiplier=1e-9, clip=1e3)
    settings = replace(FP32, steps=1, optimizer="sgd", lr=1.0, clip=0.0)
    _, _, wanted = fit(base, replace(settings, precision="fp16"), tokens=64)
    start = initial(base, make_spec("bench", base, Lora(r=8, targets=("all",)), InOrder().inner.head), 0).tensors.flat
    _, _, values = fit(base, replace(settings, precision="fp16"), engine=engine, tokens=64)
    assert np.linalg.norm(values - wanted) < 0.1 * np.linalg.norm(wanted - start)


@ON_A_CARD
def test_this_card_computes_in_the_half_precision_that_it_has():
    half = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    assert multiplies_bf16("cuda") == (half == torch.bfloat16)
    assert compute_dtype(BaseSpec("m", "nf4"), "cuda") == half
    assert compute_dtype(BaseSpec("m", "fp16"), "cuda") == torch.float16


def test_a_real_base_in_fp16_answers_as_in_fp32(shared_models):
    ids, found = torch.arange(3, 40, device=DEVICE)[None], []
    for kind in ("none", "fp16"):
        model = load_base(BaseSpec(str(shared_models / "stories260k"), kind, max_tokens=64), DEVICE).model
        with torch.no_grad():
            found.append(model(input_ids=ids).logits.float())
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) < 0.02


JOB = """
name = "half"
output = "out"
base = {{ model = "{model}", max_tokens = 64 }}
method = {{ kind = "lora", r = 16, targets = ["all"] }}
training = {{ steps = 6, batch_size = 4, lr = 0.01, save_every = 3 }}
[tasks.numbers]
kind = "generation"
metrics = ["perplexity"]
data = {{ path = "rows.jsonl" }}
"""


RUN = """
import json, sys
from fedpeft.central.job import run
from fedpeft.central.world import World
from fedpeft.processes import free_port
from fedpeft.training import checkpoint
from fedpeft.training.config import load_central

losses, config = [], load_central("job.toml", json.loads(sys.argv[1]))
run(config, World(port=free_port()), progress=lambda report: losses.append(report.loss))
print(json.dumps([losses, checkpoint.read(config.state).tally.skipped]))
"""


def job(folder, changes):
    """Losses and skipped steps of a central job, in a process of its own: DeepSpeed keeps groups of a job that has ended."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, json.dumps(changes)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@DEEPSPEED
@pytest.mark.parametrize("stage", "023")
def test_central_jobs_in_fp16_and_with_moments_of_a_byte(shared_models, tmp_path, stage):
    rows = [{"prompt": f"Once there was {i} ", "completion": f"and then {i + 1}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "job.toml").write_text(JOB.format(model=shared_models / "stories260k"))
    plain, _ = job(tmp_path, {"output": "plain", "deepspeed.stage": stage})
    for name, value in (("training.precision", "fp16"), ("base.quantization", "fp16"), ("training.optimizer", "adamw8bit")):
        losses, skipped = job(tmp_path, {"output": name, "deepspeed.stage": stage, name: value})
        assert np.isfinite(losses).all()
        if not skipped:
            np.testing.assert_allclose(losses, plain, rtol=0.05)
