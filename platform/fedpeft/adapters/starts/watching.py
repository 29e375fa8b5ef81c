"""What rows say of a base's linear layers: second moments of inputs, and gradients of weights that nobody trains.

Shape legend: N tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.adapters.making import initial
from fedpeft.adapters.starts.pairs import modules
from fedpeft.errors import AdapterError
from fedpeft.methods.values import PREFIX

if TYPE_CHECKING:
    from fedpeft.adapters.spec import AdapterSpec
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base

Found = dict[str, NDArray[np.float64]]


def covariances(base: Base, spec: AdapterSpec, samples: Samples, seed: int) -> Found:
    """Module -> mean over tokens of x x' (I, I) of its inputs, padding left out. Raises `AdapterError` for a base without weights."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    now: dict[str, Tensor | None] = {}

    def see(name: str, _host: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        rows = _tokens(inputs[0], now["mask"])
        sums[name] = sums.get(name, 0.0) + (rows.t() @ rows)
        counts[name] = counts.get(name, 0) + len(rows)

    with _watched(base, spec, seed, see) as shell, torch.no_grad():
        for batch in samples.task.batches(samples.data, samples.batch_size, seed, 0):
            now["mask"] = batch.inputs.get("attention_mask")
            samples.task.loss(shell, batch)
    return _complete(spec, {name: (total / counts[name]).cpu().numpy() for name, total in sums.items()})


def gradients(base: Base, spec: AdapterSpec, samples: Samples, seed: int) -> Found:
    """Module -> mean gradient of its weight (O, I) over the samples' loss terms. Raises `AdapterError` for a base without weights."""
    sums: dict[str, Tensor] = {}
    terms = 0

    def collect(name: str, x: Tensor, gradient: Tensor) -> None:
        g, rows = (t.reshape(-1, t.shape[-1]).double() for t in (gradient, x))
        sums[name] = sums.get(name, 0.0) + g.t() @ rows

    def see(name: str, _host: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)  # or a frozen model has none
        output.register_hook(partial(collect, name, inputs[0].detach()))  # type: ignore[no-untyped-call]
        return output

    with _watched(base, spec, seed, see) as shell:
        for batch in samples.task.batches(samples.data, samples.batch_size, seed, 0):
            loss = samples.task.loss(shell, batch)
            torch.autograd.backward(loss.total)
            terms += loss.count
    return _complete(spec, {name: (total / max(terms, 1)).cpu().numpy() for name, total in sums.items()})


@contextmanager
def _watched(base: Base, spec: AdapterSpec, seed: int, see: Any) -> Iterator[nn.Module]:
    """The bare base under round 0's head, in eval mode, with ``see`` behind every layer that the adapter targets."""
    if base.device == "meta":
        raise AdapterError(f"start: needs the weights of base {base.spec.model}; use load_base, not meta_base")
    first = initial(base, spec, seed).tensors.pick({"head"}).named()
    shell = base.shell(spec.head)
    for name, values in first.items():
        shell.get_parameter(name.removeprefix(PREFIX)).data.copy_(torch.from_numpy(values))
    handles = [shell.get_submodule(name).register_forward_hook(partial(see, name)) for name in modules(spec)]
    try:
        yield shell.eval()
    finally:
        for handle in handles:
            handle.remove()


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of real tokens (N, I) in float64."""
    rows = x.detach().reshape(-1, x.shape[-1]).double()
    if mask is None or mask.shape != x.shape[:-1]:
        return rows
    return rows[mask.reshape(-1).bool().to(rows.device)]


def _complete(spec: AdapterSpec, found: Found) -> Found:
    missing = sorted(set(modules(spec)) - set(found))
    if missing:
        raise AdapterError(f"start: no sample reached {missing[0]}; give rows of this task")
    return found
