"""The live half of sparse deltas: ``y + Delta x``, Delta zero but at k positions of each weight.

Shape legend: N rows of tokens, I in, O out, K positions. ``index`` (2, K) holds rows and columns as whole float32 numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import begin
from fedpeft.methods.branches import width_out
from fedpeft.methods.grafts import Own, graft
from fedpeft.methods.own.positions import count, spread
from fedpeft.methods.targets import resolve, width_in

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

Pick = Callable[[str, Any, int], Tensor]
LARGEST = 2**24
"""Whole numbers above it are not exact in float32."""


def add_deltas(model: nn.Module, head: HeadSpec, kind: str, targets: Sequence[str], density: float, seed: int | None = None) -> None:
    """Deltas at ``density`` of each target weight's positions: those of ``seed``, else, in tensors that travel, of its largest values.

    Raises:
        AdapterError: a target selects nothing, or a layer is too wide for exact positions.
    """
    names = resolve(model, targets)
    shapes = {name: _shape(name, model.get_submodule(name)) for name in names}
    attached = begin(model, kind, head)
    for name, (rows, columns) in shapes.items():
        host, k = model.get_submodule(name), count(rows * columns, density)
        tensors: dict[str, tuple[int, ...]] = {"delta": (k,)} | ({"index": (2, k)} if seed is None else {})
        own = graft(attached, model, f"{name}.sparse", tensors, _add)
        if seed is not None:
            own["index"] = _drawn(f"{seed}:{name}", k, (rows, columns)).to(own["delta"].device)
            continue
        own["index"].requires_grad_(False)
        if own["index"].device.type != "meta":
            own["index"].copy_(_largest(host, k))


def weight_of(host: Any) -> Tensor:
    """The weight of a linear layer as float32 (O, I), dequantized if need be."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(host).detach().float()
    return weight.t() if hasattr(host, "nf") else weight


class SparseProduct(torch.autograd.Function):
    """``x Delta^T`` (N, O) for x (N, I) and K values; neither Delta nor its gradient is kept between forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, index: Tensor, out: int) -> Tensor:
        """The product."""
        return x @ _dense(values, index, out, x.shape[-1]).t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs alone."""
        x, values, index, ctx.out = inputs
        ctx.save_for_backward(x, values, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        """Of x, and of the values: the dense weight's gradient at their positions."""
        x, values, index = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        of_x = gradient @ _dense(values, index, ctx.out, x.shape[-1]) if ctx.needs_input_grad[0] else None
        rows, columns = index
        return of_x, (gradient.t() @ x)[rows, columns], None, None


def _add(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    x = inputs[0].to(own["delta"].dtype)
    index = own["index"].detach().long()
    change: Tensor = SparseProduct.apply(x.reshape(-1, x.shape[-1]), own["delta"], index, output.shape[-1])  # type: ignore[no-untyped-call]
    return output + change.view(output.shape).to(output.dtype)


def _dense(values: Tensor, index: Tensor, out: int, width: int) -> Tensor:
    rows, columns = index
    return values.new_zeros(out, width).index_put((rows, columns), values)


def _shape(name: str, host: Any) -> tuple[int, int]:
    shape = width_out(host), width_in(host)
    if max(shape) > LARGEST:
        raise AdapterError(f"sparse: {name} has {max(shape)} rows or columns, positions are exact up to {LARGEST}; leave it out of targets")
    return shape


def _largest(host: Any, k: int) -> Tensor:
    weight = weight_of(host)
    flat = weight.abs().flatten().topk(k, sorted=False).indices.sort().values
    return torch.stack((flat // weight.shape[1], flat % weight.shape[1])).float()


def _drawn(material: str, k: int, shape: tuple[int, int]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(material.encode()).digest()[:8], "big")
    rows, columns = np.divmod(spread(seed, k, shape[0] * shape[1]), shape[1])
    return torch.from_numpy(np.stack((rows, columns)))
