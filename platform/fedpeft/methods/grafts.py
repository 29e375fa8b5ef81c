"""The live halves of the methods that peft lacks: swapped biases and hooked bottlenecks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import Attached
from fedpeft.methods.targets import trunk_name, writers

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

Begin = Callable[[nn.Module, str, "HeadSpec"], Attached]


def swap_biases(model: nn.Module, begin: Begin, head: HeadSpec) -> None:
    """Train float32 copies of the trunk's biases: in their places where the layer computes in float32, else by a hook.

    A quantized or bf16 layer casts its bias to its own dtype, which would tear a float32 copy from its buffer; there the
    hook adds the difference to the base's bias, in float32. Raises `AdapterError` when the trunk has no bias.
    """
    prefix = f"{trunk_name(model)}." if trunk_name(model) else ""
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix) and name.rpartition(".")[2] == "bias"]
    if not names:
        raise AdapterError(f"bitfit: {type(model).__name__} has no biases in its trunk; use lora, ia3, bottleneck, prompt or prefix")
    attached = begin(model, "bitfit", head)
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        attached.own[name] = _swap(owner, attached) if _plain(owner) else _shift(owner, attached)


def add_bottlenecks(model: nn.Module, begin: Begin, head: HeadSpec, dim: int) -> None:
    """Hook a bottleneck on what every attention and MLP writes. Raises `AdapterError` when there is none."""
    names = writers(model, "attention") + writers(model, "mlp")
    if not names:
        raise AdapterError(f"bottleneck: {type(model).__name__} has no linear layers in numbered blocks; use a transformer base")
    attached = begin(model, "bottleneck", head)
    for name in names:
        host = model.get_submodule(name)
        host.bottleneck = _bottleneck(host, dim)
        attached.handles.append(host.register_forward_hook(_through))
        attached.undo.append(partial(delattr, host, "bottleneck"))
        attached.own |= {f"{name}.bottleneck.{part}": p for part, p in host.bottleneck.named_parameters()}


def _plain(owner: nn.Module) -> bool:
    weight = getattr(owner, "weight", owner.bias)
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and owner.bias.dtype == torch.float32


def _swap(owner: nn.Module, attached: Attached) -> nn.Parameter:
    own, trained = owner.bias, nn.Parameter(owner.bias.detach().clone())  # type: ignore[operator]
    owner.bias = trained
    attached.undo.append(partial(setattr, owner, "bias", own))
    return trained


def _shift(owner: nn.Module, attached: Attached) -> nn.Parameter:
    own: Any = owner.bias
    trained = nn.Parameter(own.detach().float().clone())

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + (trained - module.bias).to(output.dtype)  # type: ignore[operator]

    attached.handles.append(owner.register_forward_hook(add))
    return trained


def _bottleneck(host: Any, dim: int) -> nn.ModuleDict:
    width, device = _width(host), host.weight.device
    make = partial(nn.utils.skip_init, nn.Linear, device=device, dtype=torch.float32)
    block = nn.ModuleDict({"down": make(width, dim), "up": make(dim, width)})
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    return block


def _width(host: Any) -> int:
    return int(host.nf if hasattr(host, "nf") else host.out_features)


def _through(host: Any, inputs: Any, output: Tensor) -> Tensor:
    down, up = host.bottleneck["down"], host.bottleneck["up"]
    inner = F.gelu(F.linear(output.to(down.weight.dtype), down.weight, down.bias))
    return output + F.linear(inner, up.weight, up.bias).to(output.dtype)
