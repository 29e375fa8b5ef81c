"""The live halves of expert mixtures: LoRA experts under a router, and attention over frozen bottlenecks.

Shape legend: E experts, R rank, I in, O out, D hidden width. All of it is hooks, computed in float32, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import begin
from fedpeft.methods.branches import width_out
from fedpeft.methods.grafts import Own, bottleneck_shapes, graft, squeeze
from fedpeft.methods.targets import resolve, width_in, writers

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec


def add_hydra(model: nn.Module, head: HeadSpec, targets: Sequence[str], rank: int, experts: int) -> None:
    """One A, ``experts`` B's and a softmax router on every target layer. Raises `AdapterError` when a target selects nothing."""
    names = resolve(model, targets)
    attached = begin(model, "hydralora", head)
    for name in names:
        host = model.get_submodule(name)
        shapes = {"A": (rank, width_in(host)), **_mixing(host, rank, experts)}
        graft(attached, model, f"{name}.hydralora", shapes, partial(_hydra, experts))


def add_mixture(model: nn.Module, head: HeadSpec, targets: Sequence[str], rank: int, size: tuple[int, int], balance: float = 0.0) -> None:
    """Experts and a top-k router on every target layer; ``size`` is (experts, top), ``balance`` weighs the load-balancing loss.

    Raises:
        AdapterError: a target selects nothing, or ``top`` exceeds the number of experts.
    """
    experts, top = size
    if top > experts:
        raise AdapterError(f"molora: top = {top} exceeds experts = {experts}; lower method.top")
    names = resolve(model, targets)
    attached = begin(model, "molora", head)
    for name in names:
        host = model.get_submodule(name)
        shapes = {f"A.{e}": (rank, width_in(host)) for e in range(experts)} | _mixing(host, rank, experts)
        graft(attached, model, f"{name}.molora", shapes, partial(_mixture, size, balance))


def add_fusion(model: nn.Module, head: HeadSpec, experts: Sequence[str], dim: int, roles: Sequence[str]) -> None:
    """Attention over ``experts`` frozen bottlenecks on what every attention or MLP (``roles``) writes.

    Raises:
        AdapterError: the model has no such layers.
    """
    names = [name for role in roles for name in writers(model, role)]
    if not names:
        raise AdapterError(f"adapterfusion: {type(model).__name__} has no linear layers in numbered blocks; use a transformer base")
    attached = begin(model, "adapterfusion", head)
    for name in names:
        width = width_out(model.get_submodule(name))
        shapes: dict[str, tuple[int, ...]] = {part: (width, width) for part in ("query", "key", "value")}
        parts = bottleneck_shapes(width, dim, width)
        shapes |= {f"expert.{expert}.{part}": shape for expert in experts for part, shape in parts.items()}
        own = graft(attached, model, f"{name}.adapterfusion", shapes, partial(_fuse, tuple(experts)))
        for part, parameter in own.items():
            parameter.requires_grad_(not part.startswith("expert."))


def top_weights(logits: Tensor, top: int) -> Tensor:
    """Softmax over the ``top`` largest of ``logits`` (..., E), zero elsewhere."""
    best, places = logits.topk(top, -1)
    return torch.zeros_like(logits).scatter(-1, places, best.softmax(-1))


class Beside(torch.autograd.Function):
    """Its first argument, unchanged; the backward pass also descends the second, a loss beside the task's, whoever computes that one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        """``values``."""
        ctx.like = loss
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The loss counts as it is."""
        return grad, torch.ones_like(ctx.like)


def imbalance(logits: Tensor, weights: Tensor) -> Tensor:
    """Summed over tokens: E times the sum over experts of (share of choices times mean probability); logits and weights (..., E)."""
    experts = logits.shape[-1]
    chosen = (weights > 0).reshape(-1, experts).float()
    shares, mean = chosen.mean(0) / chosen.sum(1).mean(), logits.softmax(-1).reshape(-1, experts).mean(0)
    return len(chosen) * experts * (shares * mean).sum()


def _mixing(host: Any, rank: int, experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"B.{e}": (width_out(host), rank) for e in range(experts)}
    return shapes | {"router": (experts, width_in(host))}


def _hydra(experts: int, own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    states = inputs[0].float()
    weights = F.linear(states, own["router"]).softmax(-1)
    return output + _lift(own, experts, F.linear(states, own["A"]).unsqueeze(-2) * weights.unsqueeze(-1)).to(output.dtype)


def _mixture(size: tuple[int, int], balance: float, own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    (experts, top), states = size, inputs[0].float()
    logits = F.linear(states, own["router"])
    weights = top_weights(logits, top)
    low = F.linear(states, torch.cat([own[f"A.{e}"] for e in range(experts)])).view(*states.shape[:-1], experts, -1)
    if balance and torch.is_grad_enabled():
        weights = cast(Tensor, Beside.apply(weights, balance * imbalance(logits, weights)))  # type: ignore[no-untyped-call]
    return output + _lift(own, experts, low * weights.unsqueeze(-1)).to(output.dtype)


def _lift(own: Own, experts: int, low: Tensor) -> Tensor:
    """``sum_e B_e low_e`` as one product: low (..., E, R) -> (..., O)."""
    return F.linear(low.flatten(-2), torch.cat([own[f"B.{e}"] for e in range(experts)], 1))


def _fuse(experts: tuple[str, ...], own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """``y + V sum_e s_e a_e`` with ``s = softmax(a_e' K' Q y)``: K' Q y once, not K a_e for each expert."""
    states = output.float()
    answers = torch.stack([squeeze(_part(own, f"expert.{expert}."), states) for expert in experts], -2)  # (..., E, D)
    wanted = F.linear(states, own["query"]) @ own["key"]
    shares = torch.einsum("...ed,...d->...e", answers, wanted).softmax(-1)
    return output + F.linear(torch.einsum("...ed,...e->...d", answers, shares), own["value"]).to(output.dtype)


def _part(own: Own, prefix: str) -> Own:
    return {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
