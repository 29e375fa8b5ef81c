"""One autograd function for all low-rank terms of all layers that read one input.

As `methods.lowrank` does for one adapter: base product and low-rank products go into one output, the input's gradient is gathered in
one buffer, no weight gradient of the base is made. Only x and the rank activations are kept for the backward pass.

Shape legend: N tokens, I in, O out, K layers that read one input, T slots, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedpeft.mixtures.ways import Way

Base = tuple[Tensor, Tensor | None]
"""Weight (O, I) and bias of a frozen layer."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A (T, R, I) and B (T, O, R) of layer number ``layer``; gradients are added to the sinks where there are any."""

    layer: int
    a: Tensor
    b: Tensor
    sink_a: Tensor | None = None
    sink_b: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Addend:
    """One slab's share of one term: its factors by layer, the way to multiply them, weights, and a mask (G, I) on its input."""

    way: Way
    factors: tuple[Factors, ...]
    weights: Tensor | None = None
    mask: Tensor | None = None


def mix(x: Tensor, widths: Sequence[int], bases: Sequence[Base | None], addends: Sequence[Addend]) -> tuple[Tensor, ...]:
    """K outputs (..., O) for x (..., I): the frozen product where ``bases`` has one, plus all addends."""
    tensors: list[Tensor | None] = []
    for addend in addends:
        tensors.append(addend.weights)
        for factors in addend.factors:
            tensors += [factors.a, factors.b]
    return cast(tuple[Tensor, ...], Mix.apply(x, widths, bases, addends, *tensors))  # type: ignore[no-untyped-call]


class Mix(torch.autograd.Function):
    """See `mix`; the tensors are those of the addends, in order: weights, then A and B of each layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, widths: Sequence[int], bases: Sequence[Base | None], addends: Sequence[Addend], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """See `mix`."""
        flat = x.reshape(-1, x.shape[-1])
        outputs = [_base(x, flat, width, base) for width, base in zip(widths, bases, strict=True)]
        rows = [output.view(-1, output.shape[-1]) for output in outputs]
        kept: list[Tensor] = []
        for addend in addends:
            part = addend.way.take(_masked(flat, addend.mask))
            for factors in addend.factors:
                h = addend.way.down(part, factors.a.detach().to(x.dtype))
                kept.append(h)
                addend.way.up(rows[factors.layer], _weighed(addend, h), factors.b.detach().to(x.dtype))
        ctx.save_for_backward(x, *kept)
        ctx.bases, ctx.addends = bases, addends
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Products for what wants a gradient, and for nothing else."""
        x, *kept = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        rows = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x = _base_gradient(flat, rows, ctx.bases) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        saved, wanted = iter(kept), iter(ctx.needs_input_grad[4:])
        for addend in ctx.addends:
            found += _backward(addend, flat, rows, grad_x, (saved, wanted))
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *found


def _backward(
    addend: Addend, x: Tensor, grads: list[Tensor | None], grad_x: Tensor | None, streams: tuple[Any, Any]
) -> list[Tensor | None]:
    """Gradients of weights, A's and B's of one addend; that of x is added to ``grad_x``."""
    saved, wanted = streams
    weights, want_w = addend.weights, next(wanted)
    grad_w = weights.new_zeros(weights.shape) if weights is not None and want_w else None
    part = addend.way.take(_masked(x, addend.mask))
    total = grad_x if addend.mask is None or grad_x is None else torch.zeros_like(grad_x)
    found: list[Tensor | None] = []
    for factors in addend.factors:
        h, wants, grad = next(saved), (next(wanted), next(wanted)), grads[factors.layer]
        if grad is None:
            found += [None, None]
            continue
        g = addend.way.take(grad)
        gh = addend.way.down(g, factors.b.detach().to(g.dtype).transpose(1, 2))
        if grad_w is not None and weights is not None:
            grad_w += addend.way.grad_w(gh, h, weights)
        gh = _weighed(addend, gh)
        found += _factor_gradients(addend, factors, wants, (part, h, g, gh))
        if total is not None:
            addend.way.up(total, gh, factors.a.detach().to(g.dtype).transpose(1, 2))
    if grad_x is not None and total is not None and addend.mask is not None:
        grad_x += _masked(total, addend.mask)
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


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens times the mask (G, I) of their group of consecutive tokens."""
    return x if mask is None else (x.view(len(mask), -1, x.shape[1]) * mask.unsqueeze(1)).view_as(x)


def _base(x: Tensor, flat: Tensor, width: int, base: Base | None) -> Tensor:
    """No view, so that the model may change it in place: (..., O)."""
    if base is None:
        return x.new_zeros(*x.shape[:-1], width)
    weight, bias = base
    y = x.new_empty(*x.shape[:-1], width)
    rows = y.view(-1, width)
    _ = torch.mm(flat, weight.t(), out=rows) if bias is None else torch.addmm(bias, flat, weight.t(), out=rows)
    return y


def _base_gradient(flat: Tensor, grads: Sequence[Tensor | None], bases: Sequence[Base | None]) -> Tensor:
    """The sum over layers of ``g W``, (N, I)."""
    total, started = torch.empty_like(flat), False
    for grad, base in zip(grads, bases, strict=True):
        if grad is not None and base is not None:
            _ = total.addmm_(grad, base[0]) if started else torch.mm(grad, base[0], out=total)
            started = True
    return total if started else total.zero_()
