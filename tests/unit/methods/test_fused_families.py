"""Layers that read one input are answered together: the values, gradients and masks of each alone."""

from __future__ import annotations

import pytest
import torch
from tests.unit.methods.branches import close, gradients, stock
from torch import nn

from fedpeft.methods import fused, lowrank
from fedpeft.methods.targets import families, resolve


def siblings(p: float = 0.0):
    """Three layers of one attention, as peft wraps them, with gradients on."""
    return [stock(nn.Linear(12, out, bias=bias).requires_grad_(False), p) for out, bias in ((10, True), (6, False), (6, True))]


def together(layers):
    return lambda x: torch.cat([layer(x) for layer in layers], -1)


@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B"])
@pytest.mark.parametrize("shape", [(6, 12), (2, 5, 12), (3, 140, 12)])
def test_layers_that_read_one_input_equal_stock_peft(shape, frozen):
    torch.manual_seed(1)
    layers = siblings()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name and (frozen is None or frozen not in name))
    parameters = [part["fp"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    x = torch.randn(*shape)
    theirs = gradients(together(layers), x, parameters)
    fused.fuse(layers, 0.0)
    close(gradients(together(layers), x, parameters), theirs)
    close(
        gradients(together(layers[::-1]), x, parameters)[1:2], gradients(together([layers[i] for i in (2, 1, 0)]), x, parameters)[1:2], 0.0
    )


@pytest.mark.parametrize("tokens", [5, 300])
def test_siblings_share_one_mask(tokens):
    torch.manual_seed(1)
    layers = siblings(p=0.5)
    x = torch.randn(tokens, 12)
    fused.fuse(layers, 0.5)
    parameters = [part["fp"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    for layer in layers:
        layer.train()
    torch.manual_seed(2)
    ours = gradients(together(layers), x, parameters)
    torch.manual_seed(2)
    mask = lowrank.masks(tokens, 12, 0.5, x)
    full = mask.repeat_interleave(tokens // len(mask), 0)

    def plain(z):
        low = [(z * full) @ layer.lora_A["fp"].weight.t() @ layer.lora_B["fp"].weight.t() for layer in layers]
        return torch.cat([layer.base_layer(z) + part for layer, part in zip(layers, low, strict=True)], -1)

    close(ours, gradients(plain, x, parameters))


def test_an_answer_is_used_once_and_only_for_its_own_input():
    torch.manual_seed(1)
    layers = siblings()
    want = [layer(torch.ones(2, 12)).detach() for layer in layers]
    fused.fuse(layers, 0.0)
    calls = []
    run, fused._run = fused._run, lambda *args: calls.append(1) or run(*args)
    try:
        x = torch.ones(2, 12)
        got = [layer(x) for layer in layers]
        assert len(calls) == 1
        layers[0](x)
        layers[0](x)
        assert len(calls) == 3
        x.add_(1.0)
        changed = layers[1](x)
        assert len(calls) == 4
        with torch.no_grad():
            assert not layers[2](x).requires_grad
        assert len(calls) == 5
        layers[1](torch.ones(2, 12))
        assert len(calls) == 6
    finally:
        fused._run = run
    close([g.detach() for g in got], want)
    close([changed.detach()], [(layers[1].stock if hasattr(layers[1], "stock") else layers[1].forward.stock)(x).detach()])


def test_a_sibling_that_plays_no_part_gets_no_gradient():
    torch.manual_seed(1)
    layers = siblings()
    x = torch.randn(4, 12)
    parameters = [part["fp"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    theirs = gradients(layers[1], x, parameters)
    fused.fuse(layers, 0.0)
    ours = gradients(lambda z: [layer(z) for layer in layers][1], x, parameters)
    close(ours[:2], theirs[:2])
    close(ours[4:6], theirs[4:6])
    assert all(grad is None or not grad.any() for grad in (*ours[2:4], *ours[6:]))


def test_outputs_may_be_changed_in_place():
    torch.manual_seed(1)
    layers = siblings()
    x = torch.randn(4, 12, requires_grad=True)
    fused.fuse(layers, 0.0)
    first, second, _ = [layer(x) for layer in layers]
    first += 1.0
    second *= 2.0
    (first.sum() + second.sum()).backward()
    assert x.grad is not None


def test_families_follow_the_structure(make):
    def leaves(name: str, targets: tuple[str, ...]) -> list[set[str]]:
        model = make(name)
        return [{part.rpartition(".")[2] for part in group} for group in families(model, resolve(model, targets))]

    assert leaves("llama", ("all",))[:4] == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert leaves("bert", ("attention",))[:2] == [{"query", "key", "value"}, {"dense"}]
    assert leaves("llama", ("q_proj", "v_proj"))[0] == {"q_proj", "v_proj"}
    assert all(len(group) == 1 for group in leaves("t5", ("all",)) + leaves("gpt2", ("all",)))
