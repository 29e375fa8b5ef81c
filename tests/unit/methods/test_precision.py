"""Methods over bf16 and 4-bit trunks: float32 tensors, gradients everywhere, the trunk as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpeft.errors import AdapterError
from fedpeft.methods import IA3, BitFit, Bottleneck, Lora, PrefixTuning, PromptTuning

METHODS_AT_WORK = [Lora(r=4, targets=("all",), dropout=0.1), IA3(), BitFit(), PromptTuning(3), PrefixTuning(3), Bottleneck(5)]
IDS = [method.kind for method in METHODS_AT_WORK]

pytestmark = pytest.mark.filterwarnings("ignore")


def quantized(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    for name, module in list(model.bert.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            small = bnb.nn.Linear4bit(module.in_features, module.out_features, compute_dtype=torch.float32, quant_type="nf4")
            small.support_avx512bf16_for_cpu = False  # as bases.quantize.keep_layout does, and why
            small.load_state_dict(module.state_dict())
            setattr(model.bert.get_submodule(parent), leaf, small.to("cpu"))
    return model


def check(method, model, head, rows):
    modules = {name: id(module) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(**rows).logits
    live = method.attach(model, head)
    entries = method.entries(live)
    flat = torch.zeros(sum(p.numel() for _, p in entries.values()))
    start = 0
    for _, parameter in entries.values():  # as an adapter's one buffer does it
        view = flat[start : start + parameter.numel()].view(parameter.shape)
        view.copy_(parameter.data)
        parameter.data = view
        start += parameter.numel()
    with torch.no_grad():
        if method.kind not in ("prompt", "prefix"):
            assert torch.allclose(live(**rows).logits.float(), before.float(), atol=2e-2)
    live.train()(**rows).logits.float().square().sum().backward()
    for name, (_, parameter) in entries.items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.data_ptr() >= flat.data_ptr()
    before_step = live.eval()(**rows).logits.detach().clone()
    flat.add_(0.2)
    assert not torch.equal(live(**rows).logits, before_step)
    method.detach(live)
    assert modules == {name: id(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("method", METHODS_AT_WORK, ids=IDS)
def test_bf16_trunk(method, make, head_of, rows):
    check(method, make("bert").to(torch.bfloat16), head_of("bert"), rows)


@pytest.mark.parametrize("method", METHODS_AT_WORK, ids=IDS)
def test_4bit_trunk(method, make, head_of, rows):
    check(method, quantized(make("bert")), head_of("bert"), rows)


def test_dora_starts_from_the_dequantized_rows(make, head_of, rows):
    model, method = quantized(make("bert")), Lora(r=4, dora=True)
    live = method.attach(model, head_of("bert"))
    magnitudes = [p for role, p in method.entries(live).values() if role == "M"]
    assert magnitudes
    assert all(float(p.detach().min()) > 0 for p in magnitudes)
    method.detach(live)


def test_a_head_is_asked_for_where_there_is_none(make, head_of):
    with pytest.raises(AdapterError, match="no parameters outside its trunk"):
        Lora().attach(make("bert").bert, head_of("bert"))
