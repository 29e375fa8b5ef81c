"""The arithmetic of plain LoRA: one autograd function for all layers that read one input, in place of chains of modules.

What it saves over peft's forward: no dropped-out copy of the input, no separate product of the branch and the sum (B's product
accumulates into the base's output), no weight gradient of the base. Layers that read one input (query, key and value; gate and
up) share their reading: one product with all their A's stacked, one dropout mask, one input gradient that the layers' products
accumulate into. For the backward pass only x and ``h = A x'`` are kept, and with A frozen not even x. A quantized base is made dense
where it is multiplied, in either pass, one weight at a time, and never kept.

Shape legend: N tokens, I in, O out, R rank (all layers' together where stacked), G groups of tokens, L tokens per group.

Dropout. Inverted dropout on the branch's input only, as in peft: every element of x is kept with probability 1-p and divided by
1-p, so E[mask] = 1. The mask is drawn per input column and group of consecutive tokens, not per token (as variational dropout does,
Gal and Ghahramani 2016, arXiv 1512.05287), so it multiplies A, of R rows, instead of x, of N. Groups are equal and as many as
have at least `GROUP` tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

Weight = Tensor | Callable[[], Tensor]
"""(O, I) in the input's dtype, or what makes it whenever it is multiplied."""

Base = tuple[Weight, Tensor | None]
"""Weight and bias of a frozen layer."""

GROUP = 128
"""Fewest tokens that share one dropout mask, where there are as many."""


def dense(weight: Weight) -> Tensor:
    """The weight (O, I) itself."""
    return weight if isinstance(weight, Tensor) else weight()


def masks(tokens: int, columns: int, p: float, like: Tensor) -> Tensor | None:
    """Inverted dropout masks (G, I) for ``tokens`` rows in G equal groups, from torch's generator; ``None`` when nothing is dropped."""
    if p == 0.0 or tokens == 0:
        return None
    groups = next((count for count in range(tokens // GROUP, 1, -1) if tokens % count == 0), 1)
    return like.new_empty(groups, columns).bernoulli_(1.0 - p).div_(1.0 - p)


def project(x: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    """``h = a (x * mask)'``: x (N, I), a (R, I) -> (R, N)."""
    if mask is None or len(mask) == 1:
        return (a if mask is None else a * mask) @ x.t()
    h = torch.bmm(a * mask.unsqueeze(1), x.view(len(mask), -1, x.shape[1]).transpose(1, 2))
    return h.transpose(0, 1).flatten(1)


def lift(out: Tensor, h: Tensor, a: Tensor, mask: Tensor | None) -> None:
    """``out += (h' a) * mask`` in place: out (N, I), h (R, N)."""
    if mask is None or len(mask) == 1:
        out.addmm_(h.t(), a if mask is None else a * mask)
    else:
        out.view(len(mask), -1, out.shape[1]).baddbmm_(_grouped(h, mask).transpose(1, 2), a * mask.unsqueeze(1))


def outer(h: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """``h (x * mask)``: h (R, N), x (N, I) -> (R, I)."""
    if mask is None or len(mask) == 1:
        return h @ x if mask is None else (h @ x).mul_(mask)
    return torch.bmm(_grouped(h, mask), x.view(len(mask), -1, x.shape[1])).mul_(mask.unsqueeze(1)).sum(0)


class Taker(Protocol):
    """Who takes the two halves of the factors' gradients in place of their sums over all tokens: h is (R, N), g (N, O), x (N, I)."""

    def down(self, gh: Tensor, x: Tensor) -> None:
        """``gh x`` is the gradient of all A's, stacked."""

    def up(self, place: int, h: Tensor, g: Tensor) -> None:
        """``(h g)'`` is the gradient of B number ``place``."""


def low_rank(x: Tensor, dropout: float, bases: Sequence[Base | None], *factors: Tensor) -> tuple[Tensor, ...]:
    """`LowRank` under a fresh dropout mask, as a function that torch's function modes can see and replace."""
    if has_torch_function((x, *factors)):
        return handle_torch_function(low_rank, (x, *factors), x, dropout, bases, *factors)
    return apply(x, masks(x.numel() // x.shape[-1], x.shape[-1], dropout, x), bases, None, *factors)


def apply(x: Tensor, mask: Tensor | None, bases: Sequence[Base | None], taker: Taker | None, *factors: Tensor) -> tuple[Tensor, ...]:
    """`LowRank`, typed; a ``taker`` goes without mask, and the factors without gradients."""
    return cast(tuple[Tensor, ...], LowRank.apply(x, mask, bases, taker, *factors))  # type: ignore[no-untyped-call]


class LowRank(torch.autograd.Function):
    """``((x * mask) A') B'`` for each of K layers, on top of the layer's frozen ``x W' + bias`` where its (W, bias) are given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, bases: Sequence[Base | None], taker: Taker | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        """X (..., I) -> K outputs (..., O); ``factors`` are the K A's (R, I), then the K B's (O, R), all of x's dtype."""
        count = len(bases)
        flat, rises = x.reshape(-1, x.shape[-1]), factors[count:]
        a = factors[0] if count == 1 else torch.cat(factors[:count])
        h = project(flat, a, mask)
        ctx.ranks = [factor.shape[0] for factor in factors[:count]]
        train_a, train_b = any(ctx.needs_input_grad[4 : 4 + count]), any(ctx.needs_input_grad[4 + count :])
        ctx.save_for_backward(x if train_a else None, h if train_b else None, a, mask, *rises)
        ctx.shape, ctx.weights, ctx.taker = x.shape, [base and base[0] for base in bases], taker
        ctx.set_materialize_grads(False)
        return tuple(_output(x, flat, part, b, base) for part, b, base in zip(torch.split(h, ctx.ranks), rises, bases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Products for inputs that want a gradient, and for no others."""
        x, h, a, mask, *rises = ctx.saved_tensors
        need_x, train_a = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4 : 4 + len(rises)])
        tokens = ctx.shape.numel() // ctx.shape[-1]
        fill = a.new_zeros if None in grads else a.new_empty
        gh = fill(a.shape[0], tokens) if need_x or train_a else None
        grad_x = a.new_empty(tokens, a.shape[1]) if need_x else None
        grad_b: list[Tensor | None] = [None] * len(rises)
        started = False
        for i, (grad, b, rows) in enumerate(zip(grads, rises, _spans(ctx.ranks), strict=True)):
            if grad is None:
                continue
            g = grad.reshape(-1, grad.shape[-1])  # each product with g follows the last, while g is in the cache
            if gh is not None:
                torch.mm(b.t(), g.t(), out=gh[rows])
            grad_b[i] = _rise(ctx.taker, i, h[rows], g) if ctx.needs_input_grad[4 + len(rises) + i] else None
            started = grad_x is not None and _push(grad_x, g, ctx.weights[i], started)
        if grad_x is not None and gh is not None:
            lift(grad_x if started else grad_x.zero_(), gh, a, mask)
        grad_a: Sequence[Tensor | None] = [None] * len(rises)
        if train_a and gh is not None:
            grad_a = _fall(ctx.taker, gh, x.reshape(-1, x.shape[-1]), mask, ctx.ranks)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *grad_a, *grad_b


def _rise(taker: Taker | None, place: int, h: Tensor, g: Tensor) -> Tensor | None:
    """The gradient (O, R) of one B, unless somebody takes its halves."""
    if taker is None:
        return (h @ g).t()
    taker.up(place, h, g)
    return None


def _fall(taker: Taker | None, gh: Tensor, x: Tensor, mask: Tensor | None, ranks: list[int]) -> Sequence[Tensor | None]:
    """The gradients (R, I) of the A's, unless somebody takes their halves."""
    if taker is None:
        return torch.split(outer(gh, x, mask), ranks)
    taker.down(gh, x)
    return [None] * len(ranks)


def _output(x: Tensor, flat: Tensor, h: Tensor, b: Tensor, base: Base | None) -> Tensor:
    """No view, so that the model may change it in place: (..., O)."""
    y = x.new_empty(*x.shape[:-1], b.shape[0])
    rows = y.view(-1, b.shape[0])
    if base is None:
        torch.mm(h.t(), b.t(), out=rows)
        return y
    weight, bias = dense(base[0]), base[1]
    _ = torch.mm(flat, weight.t(), out=rows) if bias is None else torch.addmm(bias, flat, weight.t(), out=rows)
    rows.addmm_(h.t(), b.t())
    return y


def _push(total: Tensor, g: Tensor, weight: Weight | None, started: bool) -> bool:
    """``total = g W``, or ``total += g W`` once it has ``started``; whether it has now."""
    if weight is not None:
        _ = total.addmm_(g, dense(weight)) if started else torch.mm(g, dense(weight), out=total)
    return started or weight is not None


def _spans(ranks: Sequence[int]) -> list[slice]:
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def _grouped(h: Tensor, mask: Tensor) -> Tensor:
    """(R, G*L) -> (G, R, L), a view."""
    return h.view(h.shape[0], len(mask), -1).transpose(0, 1)
