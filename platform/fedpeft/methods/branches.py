"""Chains of small matrices beside a linear layer: ``y + L_k ... L_1 x``, as hooks, so that any quantized layer will do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.methods.attached import Attached

_make = partial(nn.utils.skip_init, nn.Linear)


def add_branch(host: Any, name: str, parts: Sequence[tuple[str, int]], attached: Attached) -> None:
    """Put matrices beside ``host``; ``parts`` are their names with output widths, the last one's being the host's own.

    Each is float32, zero, of shape (width, width before), and known to ``attached`` as ``<name>.<part>.weight``.
    """
    base = getattr(host, "base_layer", host)
    width = int(base.nx if hasattr(base, "nx") else base.in_features)
    for part, out in parts:
        layer = _make(width, out, bias=False, device=base.weight.device, dtype=torch.float32)
        nn.init.zeros_(layer.weight)
        setattr(host, part, layer)
        attached.undo.append(partial(delattr, host, part))
        attached.own[f"{name}.{part}.weight"] = layer.weight
        width = out
    attached.handles.append(host.register_forward_hook(partial(_add, [getattr(host, part) for part, _ in parts])))


def width_out(host: Any) -> int:
    """Output features of a linear layer, wrapped by peft or not."""
    base = getattr(host, "base_layer", host)
    return int(base.nf if hasattr(base, "nf") else base.out_features)


def _add(chain: Sequence[nn.Linear], _host: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    inner = inputs[0].to(chain[0].weight.dtype)
    for layer in chain:
        inner = F.linear(inner, layer.weight)
    return output + inner.to(output.dtype)
