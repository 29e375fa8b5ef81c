"""What a weight's entries are worth, from data: squared gradients (FISH mask), or how far training moves them (LT-SFT).

The coordinator computes them once, on rows that it may see; `positions.place` makes an adapter's positions of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.methods.targets import resolve

Scores = dict[str, NDArray[np.float32]]


def squared_gradients(model: nn.Module, targets: Sequence[str], losses: Iterable[Tensor]) -> Scores:
    """Module -> sum over examples of the squared gradient of its weight (out, in): the empirical Fisher's diagonal.

    ``losses`` are made while they are taken (a generator over batches), each a sum over the rows of its batch; rows come first
    in every layer's input. Weights may be quantized, since only inputs and outputs of their layers are read
    (Sung et al. 2021, arXiv 2111.09839).

    Raises:
        AdapterError: a target selects nothing, or there was no loss.
    """
    hosts = {name: model.get_submodule(name) for name in resolve(model, targets)}
    sums: dict[str, Tensor] = {}
    handles = [host.register_forward_hook(partial(_watch, sums, name)) for name, host in hosts.items()]
    try:
        for loss in losses:
            torch.autograd.backward(loss)
    finally:
        for handle in handles:
            handle.remove()
    if set(sums) != set(hosts):
        raise AdapterError(f"sparse-fisher: no gradient reached {sorted(set(hosts) - set(sums))[:3]}; give at least one loss of this model")
    return {name: total.cpu().numpy() for name, total in sums.items()}


def largest_changes(model: nn.Module, targets: Sequence[str], fit: Callable[[list[nn.Parameter]], None]) -> Scores:
    """Module -> how far ``fit`` moved each entry of its weight (out, in); the weights are put back, bit for bit.

    ``fit`` trains the parameters that it gets, in place: the first phase of LT-SFT (Ansell et al. 2021, arXiv 2110.07560).

    Raises:
        AdapterError: a target selects nothing, or selects a quantized weight.
    """
    hosts: dict[str, Any] = {name: model.get_submodule(name) for name in resolve(model, targets)}
    fixed = [name for name, host in hosts.items() if not (type(host.weight) is nn.Parameter and host.weight.is_floating_point())]
    if fixed:
        raise AdapterError(f"sparse-lottery: {fixed[0]} is quantized and cannot be trained; use base.quantization 'none', or sparse-fisher")
    start = {name: host.weight.detach().clone() for name, host in hosts.items()}
    try:
        fit([host.weight.requires_grad_(True) for host in hosts.values()])
        return {name: _moved(host, start[name]) for name, host in hosts.items()}
    finally:
        for name, host in hosts.items():
            host.weight.requires_grad_(False).data.copy_(start[name])
            host.weight.grad = None


def _watch(sums: dict[str, Tensor], name: str, host: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Hear of the gradient of ``output``; a zero that needs one makes frozen models have it."""
    if not torch.is_grad_enabled():
        return None
    output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
    output.register_hook(partial(_collect, sums, name, inputs[0].detach()))  # type: ignore[no-untyped-call]
    return output


def _collect(sums: dict[str, Tensor], name: str, inputs: Tensor, gradient: Tensor) -> None:
    x, g = (t.float().reshape(t.shape[0], -1, t.shape[-1]) for t in (inputs, gradient))
    if name not in sums:
        sums[name] = torch.zeros(g.shape[-1], x.shape[-1], device=x.device)
    for row_x, row_g in zip(x, g, strict=True):
        sums[name] += (row_g.t() @ row_x).square()


def _moved(host: Any, start: Tensor) -> NDArray[np.float32]:
    change = (host.weight.detach() - start).abs().float()
    found: NDArray[np.float32] = (change.t() if hasattr(host, "nf") else change).cpu().numpy()
    return found
