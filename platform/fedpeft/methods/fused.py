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
from torch import Tensor, nn

from fedpeft.methods.attached import ADAPTER
from fedpeft.methods.lowrank import low_rank


class Family:
    """Layers that read one input, and the answers that the first of them prepared for the others."""

    def __init__(self) -> None:
        self.members: list[Forward] = []
        self._ready: tuple[Tensor, tuple[object, ...], dict[Forward, Tensor]] | None = None

    def answer(self, member: Forward, x: Tensor) -> Tensor:
        """The output of ``member`` for ``x`` (..., I), prepared or computed."""
        state, ready = (x._version, member.active_dropout, torch.is_grad_enabled()), self._ready
        if ready is None or ready[0] is not x or ready[1] != state or member not in ready[2]:
            ready = (x, state, dict(zip(self.members, _run(x, self.members, member.active_dropout), strict=True)))
        found = ready[2].pop(member)
        self._ready = ready if ready[2] else None
        return found


class Forward:
    """One layer's forward; peft's own still runs where its switches are used."""

    def __init__(self, layer: Any, dropout: float, family: Family) -> None:
        from transformers.pytorch_utils import Conv1D

        self.layer, self.base, self.dropout = layer, layer.base_layer, dropout
        self.down, self.up, self.stock = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.forward
        self.turned = type(self.base) is Conv1D
        self.dense = (self.turned or type(self.base) is nn.Linear) and type(self.base.weight) is nn.Parameter
        self.family = family
        family.members.append(self)

    @property
    def active_dropout(self) -> float:
        """The dropout rate now."""
        return self.dropout if self.layer.training else 0.0

    @property
    def weight(self) -> Tensor:
        """The frozen layer's (O, I)."""
        return cast(Tensor, self.base.weight.t() if self.turned else self.base.weight)

    def plain(self, x: Tensor) -> bool:
        """Whether ``x``, the factors and a frozen dense layer are of one dtype, and nothing else is hung on that layer."""
        if not self.dense or self.base.weight.requires_grad or self.base._forward_hooks or self.base._forward_pre_hooks:
            return False
        fixed = self.base.bias is None or not self.base.bias.requires_grad
        return fixed and x.dtype == self.down.weight.dtype == self.base.weight.dtype

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., I) -> (..., O)."""
        if args or kwargs or self.layer.disable_adapters or self.layer.merged:
            return cast(Tensor, self.stock(x, *args, **kwargs))
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast and all(member.plain(x) for member in self.family.members):
            return self.family.answer(self, x)
        y: Tensor = self.base(x)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.down.weight.dtype
        (low,) = low_rank(x.to(dtype), self.active_dropout, [None], self.down.weight.to(dtype), self.up.weight.to(dtype))
        return y + low.to(y.dtype)


def fuse(layers: Sequence[Any], dropout: float) -> None:
    """Give peft LoRA layers that read one input our forward; detaching drops it with the layers."""
    family = Family()
    for layer in layers:
        object.__setattr__(layer, "forward", Forward(layer, dropout, family))


def _run(x: Tensor, members: Sequence[Forward], p: float) -> tuple[Tensor, ...]:
    bases = [(member.weight, member.base.bias) for member in members]
    factors = [member.down.weight for member in members] + [member.up.weight for member in members]
    return low_rank(x, p, bases, *factors)
