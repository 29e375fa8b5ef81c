"""Layers with one LoRA branch, ours and the stock one, and what is compared of them."""

from __future__ import annotations

import torch
from torch import nn

from fedpeft.methods.lowrank import LowRank


def one(x, a, b, mask, base):
    """A single layer's output."""
    return LowRank.apply(x, mask, [base], None, a, b)[0]


def stock(layer: nn.Module, p: float = 0.0):
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.ModuleDict({"q": layer})
    turned = not isinstance(layer, nn.Linear)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, lora_dropout=p, target_modules=["q"], fan_in_fan_out=turned), holder, "fp")
    for name, parameter in holder.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data)
    return holder["q"]


def gradients(call, x: torch.Tensor, parameters: list[torch.Tensor]):
    x = x.clone().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    out = call(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in parameters)]


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            scale = max(float(b.abs().max()), 1.0)
            assert float((a.double() - b.double()).abs().max()) <= tolerance * scale
