"""A merged adapter is saved, read back, and answers in stock peft as it does here; what peft's own linear merge does wrong."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedpeft.adapters import Adapter, attach, load, make_spec, save
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.merging import make_rule, merge
from fedpeft.methods import METHODS
from fedpeft.tensors import Tensors

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[3, 5, 9, 14, 20], [3, 7, 7, 21, 4]])


@pytest.fixture(scope="module")
def base(causal):
    return load_base(BaseSpec(str(causal), "none", max_tokens=16), "cpu")


def shaken(base, seed, **settings):
    spec = make_spec(f"t{seed}", base, METHODS["lora"](targets=("all",), **settings), HeadSpec("lm"))
    return Adapter(spec, Tensors(spec.layout, np.random.default_rng(seed).normal(0, 0.2, spec.layout.size).astype(np.float32)))


def logits(base, adapter):
    with attach(base, adapter.spec) as live, torch.no_grad():
        live.load(adapter.tensors)
        return live.model.eval()(input_ids=IDS).logits.numpy()


@pytest.mark.parametrize("table", ["cat", {"kind": "svd", "rank": 3}, {"kind": "knots", "rank": 6}], ids=lambda t: str(t)[:14])
def test_a_merge_of_mixed_ranks_is_served_by_stock_peft(table, base, causal, tmp_path):
    adapters = [shaken(base, 0, r=2, alpha=8.0), shaken(base, 1, r=4, alpha=4.0)]
    out = merge(adapters, [0.75, 0.25], make_rule(table), task="both")
    save(out, tmp_path / "merged")
    assert load(tmp_path / "merged").digest == out.digest
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal), tmp_path / "merged").eval()
    with torch.no_grad():
        np.testing.assert_allclose(logits(base, out), peft(input_ids=IDS).logits.numpy(), atol=1e-5)
    assert np.abs(logits(base, out) - logits(base, adapters[0])).max() > 1e-3


def test_a_fold_is_merged_with_its_adapter_into_what_peft_can_serve(base, causal, tmp_path):
    adapter = shaken(base, 2, r=2, extra=3)
    out = merge([adapter], [1.0], make_rule("cat"))
    save(out, tmp_path / "plain")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal), tmp_path / "plain").eval()
    with torch.no_grad():
        np.testing.assert_allclose(logits(base, adapter), peft(input_ids=IDS).logits.numpy(), atol=1e-5)


def test_peft_s_linear_merge_of_equal_adapters_is_a_multiple_and_ours_is_not(base, causal):
    """Why ``linear`` is refused: it adds up sqrt(w) A and sqrt(w) B apart, so K equal adapters at weight 1/K make K times their change."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(causal), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]), "x0")
    adapter = shaken(base, 3, r=2)
    name = next(n for n in adapter.spec.layout.names if n.endswith("q_proj.lora_A.weight")).removeprefix("base_model.model.")
    layer = model.base_model.model.get_submodule(name.removesuffix(".lora_A.weight"))
    named = adapter.tensors.named()
    b, a = (named[f"base_model.model.{name}".replace("lora_A", f"lora_{f}")] for f in "BA")
    for place in range(4):
        if place:
            model.add_adapter(f"x{place}", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
        layer.lora_A[f"x{place}"].weight.data = torch.from_numpy(a.copy())
        layer.lora_B[f"x{place}"].weight.data = torch.from_numpy(b.copy())
    model.add_weighted_adapter([f"x{place}" for place in range(4)], [0.25] * 4, "mean", combination_type="linear")
    theirs = layer.get_delta_weight("mean").detach().numpy()
    np.testing.assert_allclose(theirs, 4 * (b @ a), rtol=1e-3, atol=1e-5)
    ours = merge([adapter] * 4, [0.25] * 4, make_rule("cat")).tensors.named()
    mine = ours[f"base_model.model.{name}".replace("lora_A", "lora_B")] @ ours[f"base_model.model.{name}"]
    np.testing.assert_allclose(mine, b @ a, atol=1e-5)
