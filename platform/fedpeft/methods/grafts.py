"""Tensors of our own hung on frozen layers and applied by forward hooks, so that any quantized base will do; swapped biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import Attached
from fedpeft.methods.branches import width_out
from fedpeft.methods.targets import linear_roles, trunk_name, writers

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

Begin = Callable[[nn.Module, str, "HeadSpec"], Attached]
Own = dict[str, Tensor]
Act = Callable[[Own, nn.Module, tuple[Any, ...], Any], Any]
"""What a graft does: its tensors by name, the host, the host's inputs and output -> the new output."""


def graft(attached: Attached, model: nn.Module, path: str, shapes: Mapping[str, tuple[int, ...]], act: Act | None) -> Own:
    """Hang float32 zeros of ``shapes`` on a module as ``path`` (``<host>.<leaf>``), and let ``act`` change the host's output.

    They are known to ``attached`` as ``<path>.<name>``; dots in a name make nested modules.
    """
    name, _, leaf = path.rpartition(".")
    host = model.get_submodule(name)
    block = _zeros(shapes, next(host.parameters()).device)
    setattr(host, leaf, block)
    attached.undo.append(partial(delattr, host, leaf))
    attached.own |= {f"{path}.{part}": p for part, p in block.named_parameters()}
    own: Own = dict(block.named_parameters())
    if act is not None:
        attached.handles.append(host.register_forward_hook(partial(act, own)))
    return own


def blocks(model: nn.Module) -> dict[str, int]:
    """Name -> hidden width of every block of the trunk, in order. Raises `AdapterError` when there is none."""
    last: dict[str, str] = {}
    for name in linear_roles(model):
        parts = name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        last[".".join(parts[: number + 1])] = name
    if not last:
        raise AdapterError(f"targets: {type(model).__name__} has no linear layers in numbered blocks; use a transformer base")
    return {block: width_out(model.get_submodule(name)) for block, name in last.items()}


def hidden(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_hidden(output: Any, states: Tensor) -> Any:
    """``output`` of a block with other hidden states, in their old dtype."""
    states = states.to(hidden(output).dtype)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def swap_biases(model: nn.Module, begin: Begin, head: HeadSpec) -> None:
    """Train float32 copies of the trunk's biases: in their places where the layer computes in float32, else by a hook.

    A quantized or half-precision layer casts its bias to its own dtype, which would tear a float32 copy from its buffer; there the
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


def add_bottlenecks(
    model: nn.Module, begin: Begin, head: HeadSpec, dim: int, kind: str = "bottleneck", roles: tuple[str, ...] = ("attention", "mlp")
) -> None:
    """Hook a bottleneck on what every attention or MLP (``roles``) writes. Raises `AdapterError` when there is none."""
    names = [name for role in roles for name in writers(model, role)]
    if not names:
        raise AdapterError(f"{kind}: {type(model).__name__} has no linear layers in numbered blocks; use a transformer base")
    attached = begin(model, kind, head)
    for name in names:
        width = width_out(model.get_submodule(name))
        graft(attached, model, f"{name}.{kind}", bottleneck_shapes(width, dim, width), _through)


def bottleneck_shapes(width: int, dim: int, out: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a bottleneck from ``width`` over ``dim`` hidden units to ``out``."""
    return {"down.weight": (dim, width), "down.bias": (dim,), "up.weight": (out, dim), "up.bias": (out,)}


def squeeze(own: Own, states: Tensor) -> Tensor:
    """``up(gelu(down(states)))`` in float32, of shape (..., out)."""
    inner = F.gelu(F.linear(states.float(), own["down.weight"], own["down.bias"]))
    return F.linear(inner, own["up.weight"], own["up.bias"])


def _through(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + squeeze(own, output).to(output.dtype)


def _zeros(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> nn.Module:
    root = nn.Module()
    for name, shape in shapes.items():
        *parents, leaf = name.split(".")
        node = root
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(leaf, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
    return root


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
