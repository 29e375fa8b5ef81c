"""Conversion to LoRA: exact where the rank suffices, the error is the truth where it does not, refused where no LoRA can say it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, make_spec, save
from fedpeft.adapters.convert import SMALL, to_lora
from fedpeft.bases import HeadSpec
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.tensors import Tensors

LABELS, LM = HeadSpec("classification", ("a", "b", "c")), HeadSpec("lm")


@pytest.fixture
def made(warm):
    """An adapter of ``method`` whose tensors all moved away from the start a little."""

    def make(method, name="encoder", head=LABELS, quantization="none", noise=0.1):
        from fedpeft.adapters import initial

        base = warm(name, quantization)
        spec = make_spec("t", base, method, head)
        start = initial(base, spec, 3).tensors
        moved = start.flat + noise * np.random.default_rng(0).standard_normal(spec.layout.size).astype(np.float32)
        return base, Adapter(spec, Tensors(spec.layout, moved.astype(np.float32)))

    return make


def logits(base, adapter, inputs):
    with attach(base, adapter.spec) as live, torch.no_grad():
        live.load(adapter.tensors)
        return live.model(**inputs).logits.clone()


EXACT = {
    "lora": (METHODS["lora"](r=3, targets=("all",)), 3),
    "extra": (METHODS["lora"](r=3, extra=2), 5),
    "core": (METHODS["core"](r=4), 4),
    "ia3": (METHODS["ia3"](), 64),
    "dora": (METHODS["lora"](r=2, dora=True), 64),
}


PLACES = {"encoder": LABELS, "causal": LM}


@pytest.mark.parametrize(("kind", "name"), [*((kind, "causal") for kind in EXACT), ("lora", "encoder"), ("dora", "encoder")])
def test_a_sufficient_rank_is_exact(kind, name, made, inputs, tmp_path):
    method, rank = EXACT[kind]
    base, adapter = made(method, name, PLACES[name])
    done = to_lora(base, adapter, rank)
    assert done.weight_error < 1e-5
    assert done.output_error < 1e-4
    assert torch.allclose(logits(base, done.adapter, inputs), logits(base, adapter, inputs), atol=2e-4)
    save(done.adapter, tmp_path / "lora")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_peft_serves_what_was_converted(made, inputs, folders, tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base, adapter = made(METHODS["core"](r=4), "causal", LM)
    save(to_lora(base, adapter, 4).adapter, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folders["causal"]), tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits, logits(base, adapter, inputs), atol=1e-4)


def test_the_stated_error_is_the_energy_beyond_the_rank(made):
    base, adapter = made(METHODS["lora"](r=6, targets=("q_proj",)), "causal", LM)
    done = to_lora(base, adapter, 2)
    tensors, lost, whole = adapter.tensors.named(), 0.0, 0.0
    for name in [name for name in tensors if "lora_B" in name]:
        values = np.linalg.svd(tensors[name].astype(float) @ tensors[name.replace("lora_B", "lora_A")].astype(float), compute_uv=False)
        lost, whole = lost + (values[2:] ** 2).sum(), whole + (values**2).sum()
    assert done.weight_error == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    assert 0.01 < done.output_error < 2.0
    assert 2 < done.enough <= 6
    assert to_lora(base, adapter, done.enough).weight_error <= SMALL < to_lora(base, adapter, done.enough - 1).weight_error


def test_a_rank_too_small_shows_in_the_output_error(made):
    base, adapter = made(METHODS["ia3"](), "encoder", LABELS)
    assert to_lora(base, adapter, 64).output_error < 1e-4
    assert to_lora(base, adapter, 1).output_error > 0.05


@pytest.mark.parametrize("kind", ["bottleneck", "bitfit", "prompt", "prefix"])
def test_what_no_lora_can_say_is_refused_by_name(kind, made):
    base, adapter = made(METHODS[kind](), "encoder", LABELS)
    with pytest.raises(AdapterError, match=f"{kind}.*serve it with fedpeft"):
        to_lora(base, adapter, 4)


def test_on_a_quantized_base(made):
    base, adapter = made(METHODS["core"](r=4), "causal", LM, "nf4")
    assert to_lora(base, adapter, 4).weight_error < 1e-3
