"""One autograd function for all low-rank terms of all layers that read one input.

As `methods.lowrank` does for one adapter: base product and low-rank products go into one output, the input's gradient is gathered in
one buffer, no weight gradient of the base is made. Only x and the rank activations are kept for the backward pass.

Shape legend: N tokens, I in, O out, K layers that read one input, T slots, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedpeft.methods.lowrank import Base, dense
from fedpeft.methods.lowrank import masks as grouped_masks
from fedpeft.mixtures.ways import Way

Job = tuple[Sequence[int], Sequence[Base | None], "Sequence[Addend]", Sequence[Tensor | None]]
"""Widths and bases by layer; addends, and the dropout mask (G, I) of each."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A (T, R, I) and B (T, O, R) of layer number ``layer``; gradients are added to the sinks where there are any."""

    layer: int
    a: Tensor
    b: Tensor
    sink_a: Tensor | None = None
    sink_b: Tensor | None = None

    @cached_property
    def forth(self) -> tuple[Tensor, Tensor]:
        """A and B outside autograd, for the way there."""
        return self.a.detach(), self.b.detach()

    @cached_property
    def back(self) -> tuple[Tensor, Tensor]:
        """A and B transposed, for the way back."""
        a, b = self.forth
        return a.transpose(1, 2), b.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Addend:
    """One slab's share of one term: its factors by layer, the way to multiply them, weights, and the rate of dropout on its input."""

    way: Way
    factors: tuple[Factors, ...]
    weights: Tensor | None = None
    dropout: float = 0.0


def mix(x: Tensor, widths: Sequence[int], bases: Sequence[Base | None], addends: Sequence[Addend]) -> tuple[Tensor, ...]:
    """K outputs (..., O) for x (..., I): the frozen product where ``bases`` has one, plus all addends."""
    tensors: list[Tensor | None] = []
    for addend in addends:
        tensors.append(addend.weights)
        for factors in addend.factors:
            tensors += [factors.a, factors.b]
    drawn = [_mask(x, addend.dropout) for addend in addends]
    return cast(tuple[Tensor, ...], Mix.apply(x, (widths, bases, addends, drawn), *tensors))  # type: ignore[no-untyped-call]


class Mix(torch.autograd.Function):
    """See `mix`; the tensors are those of the addends, in order: weights, then A and B of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, job: Job, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """See `mix`."""
        widths, bases, addends, masks = job
        flat = x.reshape(-1, x.shape[-1])
        outputs = [_base(x, flat, width, base) for width, base in zip(widths, bases, strict=True)]
        rows = [output.view(-1, output.shape[-1]) for output in outputs]
        kept: list[Tensor] = []
        for addend, mask in zip(addends, masks, strict=True):
            part = addend.way.take(_masked(flat, mask))
            for factors in addend.factors:
                a, b = factors.forth
                h = addend.way.down(part, a.to(x.dtype))
                kept.append(h)
                addend.way.up(rows[factors.layer], _weighed(addend, h), b.to(x.dtype))
        ctx.save_for_backward(x, *kept)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Products for what wants a gradient, and for nothing else."""
        x, *kept = ctx.saved_tensors
        _, bases, addends, masks = ctx.job
        flat = x.reshape(-1, x.shape[-1])
        rows = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x = _base_gradient(flat, rows, bases) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        streams = iter(kept), iter(ctx.needs_input_grad[2:])
        for addend, mask in zip(addends, masks, strict=True):
            found += _backward(addend, (flat, mask), rows, grad_x, streams)
        return None if grad_x is None else grad_x.view(x.shape), None, *found


def _backward(
    addend: Addend, inputs: tuple[Tensor, Tensor | None], grads: list[Tensor | None], grad_x: Tensor | None, streams: tuple[Any, Any]
) -> list[Tensor | None]:
    """Gradients of weights, A's and B's of one addend; that of x is added to ``grad_x``."""
    (x, mask), (saved, wanted) = inputs, streams
    weights, want_w = addend.weights, next(wanted)
    grad_w = weights.new_zeros(weights.shape) if weights is not None and want_w else None
    part = addend.way.take(_masked(x, mask))
    total = grad_x if mask is None or grad_x is None else torch.zeros_like(grad_x)
    found: list[Tensor | None] = []
    for factors in addend.factors:
        h, wants, grad = next(saved), (next(wanted), next(wanted)), grads[factors.layer]
        if grad is None:
            found += [None, None]
            continue
        g = addend.way.take(grad)
        a, b = factors.back
        gh = addend.way.down(g, b.to(g.dtype))
        if grad_w is not None and weights is not None:
            grad_w += addend.way.grad_w(gh, h, weights)
        gh = _weighed(addend, gh)
        found += _factor_gradients(addend, factors, wants, (part, h, g, gh))
        if total is not None:
            addend.way.up(total, gh, a.to(g.dtype))
    if grad_x is not None and total is not None and mask is not None:
        grad_x += _masked(total, mask)
    return [grad_w, *found]


def _factor_gradients(
    addend: Addend, factors: Factors, wants: tuple[bool, bool], flows: tuple[Tensor, Tensor, Tensor, Tensor]
) -> list[Tensor | None]:
    """Those of A and B; None where it went to a sink or is not wanted. ``flows``: x, h and their gradients' counterparts g, gh."""
    x, h, g, gh = flows
    found: list[Tensor | None] = [None, None]
    if wants[0]:
        into = _into(factors.a, factors.sink_a)
        addend.way.grad_a(gh, x, into)
        found[0] = into if factors.sink_a is None else None
    if wants[1]:
        into = _into(factors.b, factors.sink_b)
        addend.way.grad_b(g, _weighed(addend, h), into)
        found[1] = into if factors.sink_b is None else None
    return found


def _into(factor: Tensor, sink: Tensor | None) -> Tensor:
    return torch.zeros_like(factor, memory_format=torch.contiguous_format) if sink is None else sink


def _weighed(addend: Addend, h: Tensor) -> Tensor:
    return h if addend.weights is None else addend.way.weigh(h, addend.weights.detach().to(h.dtype))


def _mask(x: Tensor, p: float) -> Tensor | None:
    """Inverted dropout on the low-rank input, one mask per row; for a single long row, per group of its tokens."""
    rows = x.shape[0] if x.dim() > 2 else 1
    if p == 0.0 or rows == 1:
        return grouped_masks(x.numel() // x.shape[-1], x.shape[-1], p, x)
    return x.new_empty(rows, x.shape[-1]).bernoulli_(1.0 - p).div_(1.0 - p)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens times the mask (G, I) of their group of consecutive tokens."""
    return x if mask is None else (x.view(len(mask), -1, x.shape[1]) * mask.unsqueeze(1)).view_as(x)


def _base(x: Tensor, flat: Tensor, width: int, base: Base | None) -> Tensor:
    """No view, so that the model may change it in place: (..., O)."""
    if base is None:
        return x.new_zeros(*x.shape[:-1], width)
    weight, bias = dense(base[0]), base[1]
    y = x.new_empty(*x.shape[:-1], width)
    rows = y.view(-1, width)
    _ = torch.mm(flat, weight.t(), out=rows) if bias is None else torch.addmm(bias, flat, weight.t(), out=rows)
    return y


def _base_gradient(flat: Tensor, grads: Sequence[Tensor | None], bases: Sequence[Base | None]) -> Tensor:
    """The sum over layers of ``g W``, (N, I)."""
    total, started = torch.empty_like(flat), False
    for grad, base in zip(grads, bases, strict=True):
        if grad is not None and base is not None:
            _ = total.addmm_(grad, dense(base[0])) if started else torch.mm(grad, dense(base[0]), out=total)
            started = True
    return total if started else total.zero_()
