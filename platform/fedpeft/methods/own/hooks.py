"""The live halves: which module hosts what, and what the hook on it computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import begin
from fedpeft.methods.branches import width_out
from fedpeft.methods.grafts import Own, blocks, bottleneck_shapes, graft, hidden, squeeze, with_hidden
from fedpeft.methods.targets import groups, resolve, width_in, writers

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec


def add_parallel(model: nn.Module, head: HeadSpec, dim: int) -> None:
    """A bottleneck from the first to the last linear layer of every MLP. Raises `AdapterError` when there is none."""
    found = groups(model, "mlp")
    if not found:
        raise AdapterError(f"parallel: {type(model).__name__} has no MLP in numbered blocks; use lora, or a transformer base")
    attached = begin(model, "parallel", head)
    for names in found:
        first, last = model.get_submodule(names[0]), model.get_submodule(names[-1])
        seen: dict[str, Tensor] = {}
        attached.handles.append(first.register_forward_pre_hook(partial(_remember, seen)))
        shapes = bottleneck_shapes(width_in(first), dim, width_out(last))
        graft(attached, model, f"{names[-1]}.parallel", shapes, partial(_beside, seen))


def add_scales(model: nn.Module, head: HeadSpec, kind: str, targets: Sequence[str], norms: bool) -> None:
    """Factors, and with ``norms`` shifts as well, on what the target layers and the norms of the blocks put out.

    Raises:
        AdapterError: a target selects nothing.
    """
    names = resolve(model, targets) + (_norms(model) if norms else [])
    attached = begin(model, kind, head)
    for name in names:
        width = _features(model.get_submodule(name))
        shapes = {"scale": (width,)} | ({"shift": (width,)} if norms else {})
        own = graft(attached, model, f"{name}.{kind}", shapes, _scale_and_shift if norms else _rescale)
        nn.init.ones_(own["scale"])


def add_subspaces(model: nn.Module, head: HeadSpec, rank: int) -> None:
    """LoReFT on what every block puts out. Raises `AdapterError` when there is no block, or ``rank`` exceeds its width."""
    found = blocks(model)
    narrow = min(found.values())
    if rank > narrow:
        raise AdapterError(f"reft: r = {rank} exceeds the hidden width {narrow} of {type(model).__name__}; lower method.r")
    attached = begin(model, "reft", head)
    for name, width in found.items():
        shapes: dict[str, tuple[int, ...]] = {"rotation": (rank, width), "source.weight": (rank, width), "source.bias": (rank,)}
        graft(attached, model, f"{name}.reft", shapes, _edit)


def add_kronecker(model: nn.Module, head: HeadSpec, dim: int, terms: int) -> None:
    """Compacter on what every attention and MLP writes. Raises `AdapterError` when ``terms`` does not divide the widths."""
    names = writers(model, "attention") + writers(model, "mlp")
    widths = {name: width_out(model.get_submodule(name)) for name in names}
    odd = sorted({width for width in widths.values() if width % terms} | ({dim} if dim % terms else set()))
    if odd or not names:
        raise AdapterError(
            f"compacter: terms = {terms} does not divide {odd} of {type(model).__name__}; choose a common divisor of method.dim and widths"
            if odd
            else f"compacter: {type(model).__name__} has no linear layers in numbered blocks; use a transformer base"
        )
    attached = begin(model, "compacter", head)
    stack = next(iter(blocks(model))).rpartition(".")[0].rpartition(".")[0]  # what holds the list of blocks
    slow = graft(attached, model, f"{stack}.compacter".lstrip("."), {"slow": (terms, terms, terms)}, None)
    for name, width in widths.items():
        graft(attached, model, f"{name}.compacter", _kronecker_shapes(width, dim, terms), partial(_compact, slow))


def frame(rotation: Tensor) -> Tensor:
    """Orthonormal columns (width, rank) that span the rows of ``rotation`` (rank, width): QR, signs fixed."""
    columns, triangle = torch.linalg.qr(rotation.t())
    fixed: Tensor = columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return fixed


def kronecker_sum(slow: Tensor, left: Tensor, right: Tensor, states: Tensor) -> Tensor:
    """``x -> sum_i (A_i kron t_i s_i^T) x`` without the matrix; A (n, p, q), s (n, in/q), t (n, out/p), states (..., in)."""
    cut = states.view(*states.shape[:-1], slow.shape[2], -1)
    return torch.einsum("...qd,nd,npq,nc->...pc", cut, left, slow, right).flatten(-2)


def _remember(seen: dict[str, Tensor], host: nn.Module, inputs: tuple[Any, ...]) -> None:
    seen["input"] = inputs[0]


def _beside(seen: dict[str, Tensor], own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    states = seen.pop("input", None)
    if states is None or states.shape[:-1] != output.shape[:-1]:
        raise AdapterError("parallel: the last layer of an MLP was called without its first, whose input it needs; call the whole model")
    return output + squeeze(own, states).to(output.dtype)


def _scale_and_shift(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return (output.float() * own["scale"] + own["shift"]).to(output.dtype)


def _rescale(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """``s * (y - b) + b``, so that the weight is scaled and the bias is not."""
    bias = getattr(host, "bias", None)
    product = output.float() if bias is None else output.float() - bias.float()
    return (output.float() + (own["scale"] - 1.0) * product).to(output.dtype)


def _edit(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    states = hidden(output)
    edit = F.linear(states.float(), own["source.weight"], own["source.bias"])
    return with_hidden(output, states + F.linear(edit, frame(own["rotation"])).to(states.dtype))


def _compact(slow: Own, own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    inner = kronecker_sum(slow["slow"], own["fast_down.left"], own["fast_down.right"], output.float()) + own["fast_down.bias"]
    outer = kronecker_sum(slow["slow"], own["fast_up.left"], own["fast_up.right"], F.gelu(inner)) + own["fast_up.bias"]
    return output + outer.to(output.dtype)


def _kronecker_shapes(width: int, dim: int, terms: int) -> dict[str, tuple[int, ...]]:
    wide, small = (terms, width // terms), (terms, dim // terms)
    down: dict[str, tuple[int, ...]] = {"fast_down.left": wide, "fast_down.right": small, "fast_down.bias": (dim,)}
    return down | {"fast_up.left": small, "fast_up.right": wide, "fast_up.bias": (width,)}


def _norms(model: nn.Module) -> list[str]:
    """Norm layers inside the blocks."""
    inside = tuple(f"{name}." for name in blocks(model))
    named = ((name, module) for name, module in model.named_modules() if name.startswith(inside))
    return [name for name, module in named if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None]


def _features(host: Any) -> int:
    return int(host.weight.shape[0]) if "norm" in type(host).__name__.lower() else width_out(host)
