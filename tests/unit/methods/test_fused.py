"""The fused LoRA forward against stock peft, a float64 oracle, and its promises about memory and dropout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.methods.branches import close, gradients, one, stock
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedpeft.methods import frozen, fused, lowrank


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 17), st.integers(1, 5)),
    bias=st.booleans(),
    train=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    drop=st.booleans(),
    over_base=st.booleans(),
)
def test_values_and_gradients_equal_a_float64_oracle(shape, sizes, bias, train, drop, over_base):
    torch.manual_seed(0)
    inner, outer_size, rank = sizes
    x = torch.randn(*shape, inner)
    a, b = torch.randn(rank, inner), torch.randn(outer_size, rank)
    w, c = torch.randn(outer_size, inner), torch.randn(outer_size) if bias else None
    tokens = x.numel() // inner
    mask = lowrank.masks(tokens, inner, 0.3, x) if drop else None
    full = torch.ones(tokens, inner) if mask is None else mask.repeat_interleave(tokens // len(mask), 0)
    ours = [t.clone().requires_grad_(flag) for t, flag in zip((x, a, b), train, strict=True)]
    theirs = [t.double().requires_grad_(flag) for t, flag in zip((x, a, b), train, strict=True)]
    got = one(*ours, mask, (w, c) if over_base else None)
    want = (theirs[0] * full.double().view_as(x)) @ theirs[1].t() @ theirs[2].t()
    if over_base:
        want = want + nn.functional.linear(theirs[0], w.double(), None if c is None else c.double())
    push = torch.randn_like(got)
    got.backward(push)
    want.backward(push.double())
    close([got.detach(), *(t.grad for t in ours)], [want.detach(), *(t.grad for t in theirs)], 1e-5)


@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (127, 1), (256, 2), (257, 1), (390, 3), (1024, 8)])
def test_equal_groups_carry_their_own_masks(tokens, groups):
    torch.manual_seed(0)
    x, a, b = torch.randn(tokens, 7), torch.randn(3, 7), torch.randn(5, 3)
    mask = lowrank.masks(tokens, 7, 0.5, x)
    assert mask.shape == (groups, 7)
    full = mask.repeat_interleave(tokens // groups, 0)
    ours = gradients(lambda z: one(z, a.requires_grad_(), b.requires_grad_(), mask, None), x, [a, b])
    theirs = gradients(lambda z: (z * full) @ a.t() @ b.t(), x, [a, b])
    close(ours, theirs)


@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 12), (2, 5, 12), (1, 140, 12)])
def test_equals_stock_peft(shape, bias, frozen):
    torch.manual_seed(1)
    layer = stock(nn.Linear(12, 10, bias=bias))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name and (frozen is None or frozen not in name))
    parameters = [layer.lora_A["fp"].weight, layer.lora_B["fp"].weight]
    x = torch.randn(*shape)
    theirs = gradients(layer, x, parameters)
    fused.fuse([layer], 0.0)
    close(gradients(layer, x, parameters), theirs)
    assert (frozen is None) or parameters[0 if frozen == "lora_A" else 1].grad is None


def test_equals_stock_peft_on_gpt2s_transposed_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(1)
    layer = stock(Conv1D(10, 12)).requires_grad_(False)
    parameters = [layer.lora_A["fp"].weight.requires_grad_(), layer.lora_B["fp"].weight.requires_grad_()]
    x = torch.randn(2, 5, 12)
    theirs = gradients(layer, x, parameters)
    fused.fuse([layer], 0.0)
    assert layer.forward.frozen.dense
    close(gradients(layer, x, parameters), theirs)


def _nf4():
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def _int8():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_nf4, _int8])
def test_quantized_bases_equal_stock_peft(make):
    torch.manual_seed(1)
    layer = stock(make())
    parameters = [layer.lora_A["fp"].weight, layer.lora_B["fp"].weight]
    x = torch.randn(3, 4, 64)
    theirs = gradients(layer, x, parameters)
    fused.fuse([layer], 0.0)
    assert not layer.forward.frozen.dense
    close(gradients(layer, x, parameters), theirs)


@pytest.mark.filterwarnings("ignore")
def test_four_bit_layers_of_one_family_are_made_dense_one_at_a_time_and_never_kept():
    torch.manual_seed(1)
    layers = [stock(_nf4()) for _ in range(2)]
    parameters = [layer.get_parameter(f"lora_{factor}.fp.weight") for layer in layers for factor in "AB"]
    x, kept, made = torch.randn(5, 64), [], []
    theirs = gradients(lambda y: sum(layer(y) for layer in layers), x, parameters)
    fused.fuse(layers, 0.0)
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        patch.setattr(frozen, "_unpacked", lambda weight, dtype, own=frozen._unpacked: made.append(1) or own(weight, dtype))
        close(gradients(lambda y: sum(layer(y) for layer in layers), x, parameters), theirs)
    assert len(made) == 4
    assert torch.Size([32, 64]) not in kept
    with torch.no_grad():
        own = layers[0].base_layer(x)
        close([layers[0](x)], [own + x @ parameters[0].t() @ parameters[1].t()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_nf4, lambda: nn.Linear(64, 32).requires_grad_(False)])
def test_under_autocast_layers_are_fused_in_its_dtype(make):
    torch.manual_seed(1)
    layer = stock(make())
    parameters = [layer.lora_A["fp"].weight, layer.lora_B["fp"].weight]
    x = torch.randn(3, 4, 64)
    exact = gradients(layer, x, parameters)
    fused.fuse([layer], 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        ours = gradients(layer, x, parameters)
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)
    close([grad.float() for grad in ours], exact, 2e-2)


@pytest.mark.filterwarnings("ignore")
def test_torchao_weights_are_called():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(1)
    base = nn.Linear(64, 32)
    quantize_(base, Int8WeightOnlyConfig())
    layer = stock(base.requires_grad_(False))
    fused.fuse([layer], 0.0)
    assert not layer.forward.frozen.dense
    a, b = layer.lora_A["fp"].weight, layer.lora_B["fp"].weight
    x = torch.randn(4, 64)
    close([layer(x).detach()], [(base(x) + x @ a.t() @ b.t()).detach()])


def test_low_precision_base_keeps_the_branch_in_float32():
    torch.manual_seed(1)
    layer = stock(nn.Linear(12, 10)).to(torch.bfloat16).requires_grad_(False)
    for parameter in (layer.lora_A["fp"].weight, layer.lora_B["fp"].weight):
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    parameters = [layer.lora_A["fp"].weight, layer.lora_B["fp"].weight]
    x = torch.randn(4, 12).to(torch.bfloat16)
    theirs = gradients(layer, x, parameters)
    fused.fuse([layer], 0.0)
    ours = gradients(layer, x, parameters)
    assert ours[0].dtype == torch.bfloat16
    assert ours[2].dtype == torch.float32
    close(ours, theirs, 1e-2)


def test_autocast_computes_low_and_returns_float32_gradients():
    torch.manual_seed(1)
    layer = stock(nn.Linear(12, 10))
    layer.base_layer.requires_grad_(False)
    parameters = [layer.lora_A["fp"].weight, layer.lora_B["fp"].weight]
    x = torch.randn(4, 12)

    def call(z):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(z)

    theirs = gradients(call, x, parameters)
    fused.fuse([layer], 0.0)
    ours = gradients(call, x, parameters)
    assert ours[0].dtype == torch.bfloat16
    assert ours[2].dtype == torch.float32
    close(ours, theirs, 3e-2)


def test_a_frozen_factor_keeps_nothing_for_the_backward_pass():
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    a, b = torch.randn(2, 6), torch.randn(5, 2, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one(x, a, b, None, (w, None))
    assert not any(t.shape == x.shape for t in kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one(x, a.requires_grad_(), b.detach(), None, (w, None))
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    assert not any(t.shape == (2, 4) for t in kept)


def test_dropout_keeps_the_mean_and_the_share_and_ends_with_training():
    torch.manual_seed(0)
    mask = lowrank.masks(lowrank.GROUP * 400, 50, 0.2, torch.empty(0))
    assert set(mask.unique().tolist()) == {0.0, 1.25}
    assert abs(float(mask.mean()) - 1.0) < 0.02
    assert abs(float((mask == 0).float().mean()) - 0.2) < 0.01
    layer = stock(nn.Linear(12, 10).requires_grad_(False), p=0.5)
    fused.fuse([layer], 0.5)
    x = torch.randn(3, 12)
    torch.manual_seed(3)
    first = layer.train()(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    a, b = layer.lora_A["fp"].weight, layer.lora_B["fp"].weight
    close([layer.eval()(x).detach()], [(layer.base_layer(x) + x @ a.t() @ b.t()).detach()])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_gives_the_same_gradients(p):
    torch.manual_seed(1)
    layer = stock(nn.Linear(12, 10).requires_grad_(False), p).train()
    fused.fuse([layer], p)
    parameters = [layer.lora_A["fp"].weight, layer.lora_B["fp"].weight]
    x = torch.randn(4, 12)
    torch.manual_seed(2)
    plain = gradients(layer, x, parameters)
    torch.manual_seed(2)
    close(gradients(lambda z: checkpoint(layer, z, use_reentrant=False), x, parameters), plain, 0.0)


def test_pefts_own_switches_still_work():
    torch.manual_seed(1)
    layer = stock(nn.Linear(12, 10))
    fused.fuse([layer], 0.0)
    x = torch.randn(4, 12)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    before = layer(x).detach()
    layer.merge()
    close([layer(x).detach()], [before])


def test_strided_and_empty_inputs():
    torch.manual_seed(1)
    layer = stock(nn.Linear(12, 10).requires_grad_(False), 0.1).train()
    fused.fuse([layer], 0.1)
    assert layer(torch.randn(0, 12)).shape == (0, 10)
    parameters = [layer.lora_A["fp"].weight]
    layer.eval()
    wide = torch.randn(12, 2, 5)
    close(
        gradients(lambda z: layer(z.permute(1, 2, 0)), wide, parameters),
        gradients(lambda z: layer(z.permute(1, 2, 0).contiguous()), wide, parameters),
    )
