"""Plain LoRA's forward and backward as one autograd function per linear layer, in place of peft's chain of modules.

What it saves: no dropped-out copy of the input, no separate product of the branch and the sum (B's product accumulates into the
base's output), no weight gradient of the base, and nothing at all for a frozen factor: with A frozen the input is not
even kept for the backward pass. Only ``x``, shared with the layer's neighbours, and ``h = x A'`` are kept.

Shape legend: N tokens, I in, O out, R rank, G groups of tokens, L tokens per group.

Dropout. Inverted dropout on the branch's input only, as in peft: every element of x is kept with probability 1-p and divided by
1-p, so E[mask] = 1. The mask is drawn per group of `GROUP` consecutive tokens and input column, not per token (as variational
dropout does, Gal and Ghahramani 2016, arXiv 1512.05287), so it multiplies A, of R rows, instead of x, of N.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedpeft.methods.attached import ADAPTER

Base = tuple[Tensor, Tensor | None]
"""Weight (O, I) and bias of a frozen layer."""

GROUP = 64
"""Tokens that share one dropout mask."""


def masks(tokens: int, columns: int, p: float, like: Tensor) -> Tensor | None:
    """Inverted dropout masks (G, I) for ``tokens`` rows, from torch's generator; ``None`` when nothing is dropped."""
    if p == 0.0 or tokens == 0:
        return None
    keep = 1.0 - p
    return like.new_empty(-(-tokens // GROUP), columns).bernoulli_(keep).div_(keep)


def project(x: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    """``h = a (x * mask)'``: x (N, I), a (R, I) -> (R, N)."""
    if mask is None:
        return a @ x.t()
    h = x.new_empty(a.shape[0], x.shape[0])
    for rows, part in _groups(x.shape[0], a * mask.unsqueeze(1)):
        torch.bmm(part, _split(x[rows], part).transpose(1, 2), out=_columns(h[:, rows], part))
    return h


def lift(out: Tensor, h: Tensor, a: Tensor, mask: Tensor | None) -> None:
    """``out += (h' a) * mask`` in place: out (N, I), h (R, N)."""
    if mask is None:
        out.addmm_(h.t(), a)
        return
    for rows, part in _groups(out.shape[0], a * mask.unsqueeze(1)):
        _split(out[rows], part).baddbmm_(_columns(h[:, rows], part).transpose(1, 2), part)


def outer(h: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """``h (x * mask)``: h (R, N), x (N, I) -> (R, I)."""
    if mask is None:
        return h @ x
    parts = [
        torch.bmm(_columns(h[:, rows], part), _split(x[rows], part)).mul_(part).sum(0)
        for rows, part in _groups(x.shape[0], mask.unsqueeze(1))
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class LowRank(torch.autograd.Function):
    """``((x * mask) A') B'``, on top of the frozen layer's ``x W' + bias`` when its (W, bias) are given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, base: Base | None) -> Tensor:
        """X (..., I) -> (..., O); A (R, I), B (O, R), W (O, I), all of one dtype."""
        flat = x.reshape(-1, x.shape[-1])
        h = project(flat, a, mask)
        y = h.t() @ b.t() if base is None else _affine(flat, base).addmm_(h.t(), b.t())
        train_a, train_b = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if train_a else None, h if train_b else None, a, b, mask, base and base[0])
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Products for inputs that want a gradient, and for no others."""
        x, h, a, b, mask, weight = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        g = grad.reshape(-1, grad.shape[-1])
        gh = b.t() @ g.t() if need_x or need_a else g
        grad_x = _input_grad(g, gh, a, mask, weight).view(ctx.shape) if need_x else None
        grad_a = outer(gh, x.reshape(-1, x.shape[-1]), mask) if need_a else None
        return grad_x, grad_a, (h @ g).t() if need_b else None, None, None


class Forward:
    """What a peft LoRA layer calls instead of its own forward; peft's own still runs where its switches are used."""

    def __init__(self, layer: Any, dropout: float) -> None:
        from transformers.pytorch_utils import Conv1D

        self.layer, self.base, self.dropout = layer, layer.get_base_layer(), dropout
        self.down, self.up, self.stock = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.forward
        self.turned = type(self.base) is Conv1D
        self.dense = (self.turned or type(self.base) is nn.Linear) and type(self.base.weight) is nn.Parameter

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., I) -> (..., O)."""
        if args or kwargs or self.layer.disable_adapters or self.layer.merged:
            return cast(Tensor, self.stock(x, *args, **kwargs))
        a, b, base = self.down.weight, self.up.weight, self.base
        p = self.dropout if self.layer.training else 0.0
        autocast = torch.is_autocast_enabled(x.device.type)
        if self.dense and not autocast and x.dtype == a.dtype == base.weight.dtype and not base.weight.requires_grad:
            return _branch(x, a, b, p, (base.weight.t() if self.turned else base.weight, base.bias))
        y: Tensor = base(x)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else a.dtype
        return y + _branch(x.to(dtype), a.to(dtype), b.to(dtype), p, None).to(y.dtype)


def fuse(layer: Any, dropout: float) -> None:
    """Give a peft LoRA layer over a dense or quantized linear our forward; detaching drops it with the layer."""
    object.__setattr__(layer, "forward", Forward(layer, dropout))


def _branch(x: Tensor, a: Tensor, b: Tensor, p: float, base: Base | None) -> Tensor:
    mask = masks(x.numel() // x.shape[-1], x.shape[-1], p, x)
    return cast(Tensor, LowRank.apply(x, a, b, mask, base))  # type: ignore[no-untyped-call]


def _affine(x: Tensor, base: Base) -> Tensor:
    weight, bias = base
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _input_grad(g: Tensor, gh: Tensor, a: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    out = g.new_zeros(g.shape[0], a.shape[1]) if weight is None else g @ weight
    lift(out, gh, a, mask)
    return out


def _groups(tokens: int, parts: Tensor) -> list[tuple[slice, Tensor]]:
    """Whole groups in one batch, then the shorter last one; ``parts`` (G, ., .) goes with them."""
    whole = tokens // GROUP
    found = [(slice(0, whole * GROUP), parts[:whole]), (slice(whole * GROUP, tokens), parts[whole:])]
    return [(rows, part) for rows, part in found if len(part)]


def _split(x: Tensor, part: Tensor) -> Tensor:
    """(G*L, .) -> (G, L, .), a view."""
    return x.view(len(part), -1, x.shape[-1])


def _columns(h: Tensor, part: Tensor) -> Tensor:
    """(R, G*L) -> (G, R, L), a view."""
    return h.view(h.shape[0], len(part), -1).transpose(0, 1)
