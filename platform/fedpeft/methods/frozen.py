"""The frozen layer beneath low-rank products, read as a dense weight in the type that is multiplied, whatever it is in memory.

Who multiplies the weight itself lets the low-rank product accumulate onto the layer's output, in place of a pass over the output more,
and makes no weight gradient. A weight that is not dense in that type becomes so whenever it is multiplied, and is not kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpeft.methods.lowrank import Base


class Frozen:
    """A linear layer, Conv1D or 4-bit layer of bitsandbytes whose product may be computed in its place."""

    def __init__(self, layer: Any) -> None:
        weight = getattr(layer, "weight", None)
        self.layer = layer
        self.turned = hasattr(layer, "nf") and hasattr(layer, "nx")
        self.dense = (self.turned or type(layer) is nn.Linear) and type(weight) is nn.Parameter
        self.packed = hasattr(weight, "quant_state")

    @property
    def width(self) -> int:
        """O."""
        return int(self.layer.nf if self.turned else self.layer.out_features)

    def readable(self, dtype: torch.dtype, autocast: bool) -> bool:
        """Whether `base` gives what the layer itself would multiply for inputs in ``dtype``.

        A 4-bit layer computes itself where no gradient is wanted: its own kernel for few tokens never makes the weight dense.
        """
        weight: Any = getattr(self.layer, "weight", None)
        if self.packed and torch.is_grad_enabled() and weight.quant_state is not None:
            return autocast or dtype == weight.quant_state.dtype
        return self.dense and (autocast or dtype == weight.dtype)

    def base(self, dtype: torch.dtype) -> Base:
        """Weight (O, I) and bias in ``dtype``; what is not so in memory becomes so whenever it is multiplied."""
        weight, bias = self.layer.weight, self.layer.bias
        bias = bias if bias is None else bias.to(dtype)
        if self.packed:
            return partial(_unpacked, weight, dtype), bias
        weight = weight.t() if self.turned else weight
        return (weight if weight.dtype == dtype else partial(weight.to, dtype)), bias


def _unpacked(weight: Any, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight (O, I), dense."""
    from bitsandbytes.functional import dequantize_4bit

    return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state)).to(dtype)
