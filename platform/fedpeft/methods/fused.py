"""What peft's LoRA layers call instead of their own forward: `lowrank.LowRank`, layers that read one input together.

Layers of one family (query, key and value of one attention) are called one after the other with the same tensor. The first call
answers for all of them, the others take their answer. Where another tensor comes, or in another mode, the layer that is called
computes; what was prepared is only ever used for the very tensor that it was computed from. Families come from the model's
structure, never from what was seen before, so that a resumed run computes what an undisturbed one does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fedpeft.methods.attached import ADAPTER
from fedpeft.methods.frozen import Frozen
from fedpeft.methods.lowrank import low_rank


class Family:
    """Layers that read one input, and the answers that the first of them prepared for the others."""

    def __init__(self) -> None:
        self.members: list[Forward] = []
        self._ready: tuple[Tensor, tuple[object, ...], dict[Forward, Tensor]] | None = None

    def answer(self, member: Forward, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The output of ``member`` for ``x`` (..., I) in ``dtype``, prepared or computed."""
        state, ready = (x._version, member.active_dropout, torch.is_grad_enabled(), dtype), self._ready
        if ready is None or ready[0] is not x or ready[1] != state or member not in ready[2]:
            ready = (x, state, dict(zip(self.members, _run(x, self.members, member.active_dropout, dtype), strict=True)))
        found = ready[2].pop(member)
        self._ready = ready if ready[2] else None
        return found


class Forward:
    """One layer's forward; peft's own still runs where its switches are used."""

    def __init__(self, layer: Any, dropout: float, family: Family) -> None:
        self.layer, self.base, self.dropout = layer, layer.base_layer, dropout
        self.down, self.up, self.stock = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.forward
        self.frozen = Frozen(self.base)
        self.family = family
        family.members.append(self)

    @property
    def active_dropout(self) -> float:
        """The dropout rate now."""
        return self.dropout if self.layer.training else 0.0

    def joins(self, dtype: torch.dtype, autocast: bool) -> bool:
        """Whether the frozen layer can be computed here, in ``dtype``: of a known kind, frozen, and nothing else is hung on it."""
        base = self.base
        if base.weight.requires_grad or base._forward_hooks or base._forward_pre_hooks:
            return False
        if base.bias is not None and base.bias.requires_grad:
            return False
        return self.frozen.readable(dtype, autocast) and (autocast or dtype == self.down.weight.dtype)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., I) -> (..., O)."""
        if args or kwargs or self.layer.disable_adapters or self.layer.merged:
            return cast(Tensor, self.stock(x, *args, **kwargs))
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if all(member.joins(dtype, autocast) for member in self.family.members):
            return self.family.answer(self, x, dtype)
        y: Tensor = self.base(x)
        dtype = dtype if autocast else self.down.weight.dtype
        (low,) = low_rank(x.to(dtype), self.active_dropout, [None], self.down.weight.to(dtype), self.up.weight.to(dtype))
        return y + low.to(y.dtype)


def fuse(layers: Sequence[Any], dropout: float) -> None:
    """Give peft LoRA layers that read one input our forward; detaching drops it with the layers."""
    family = Family()
    for layer in layers:
        object.__setattr__(layer, "forward", Forward(layer, dropout, family))


def _run(x: Tensor, members: Sequence[Forward], p: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    factors = [member.down.weight.to(dtype) for member in members] + [member.up.weight.to(dtype) for member in members]
    return low_rank(x.to(dtype), p, [member.frozen.base(dtype) for member in members], *factors)
