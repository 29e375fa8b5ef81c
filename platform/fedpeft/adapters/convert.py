"""Any adapter that changes linear layers, as a plain LoRA that every server takes; what is lost is measured and said.

The weight change of a layer is read off the layer itself (`affine`), so the conversion asks nothing of the method but that the layer
stays affine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.adapters.affine import changes, probes
from fedpeft.adapters.live import Live
from fedpeft.adapters.making import make_spec
from fedpeft.adapters.spec import Adapter
from fedpeft.bases.base import Base
from fedpeft.bases.trial import trial
from fedpeft.errors import AdapterError
from fedpeft.methods.lora import Lora
from fedpeft.tensors import Tensors

SMALL = 0.01
"""A weight error that is not worth a larger rank."""


@dataclass(frozen=True)
class Converted:
    """The LoRA, the share of the weight change that its rank lost, and how far its logits are from the original's.

    ``weight_error`` is ||dW - B A|| / ||dW|| over all layers; ``output_error`` the distance of logits over the distance that the
    original moves them from the base's, on random tokens: what no weight of a linear layer can say shows there. ``enough`` is the
    smallest rank whose ``weight_error`` is at most `SMALL`.
    """

    adapter: Adapter
    weight_error: float
    output_error: float
    enough: int


def to_lora(base: Base, adapter: Adapter, rank: int) -> Converted:
    """The best LoRA of ``rank`` for what ``adapter`` does to the linear layers of ``base``.

    Raises:
        AdapterError: the adapter is of another base, leaves the linear layers as they are, or makes one of them non-linear.
    """
    shell = base.shell(adapter.spec.head)
    plain = probes(shell)
    inputs = trial(base, adapter.spec.head, width=16)
    with Live.attach(base, adapter.spec) as live:
        live.load(adapter.tensors)
        live.model.eval()
        wanted, found = _logits(live.model, inputs), _factors(live.model, plain, rank, adapter)
    if not found:
        raise AdapterError(
            f"adapter {adapter.spec.task}: {adapter.spec.method.kind} changes no weight of a linear layer; serve it with fedpeft as it is"
        )
    lora = _adapter(base, adapter, found, rank)
    with Live.attach(base, lora.spec) as live:
        live.load(Tensors.zeros(lora.spec.layout).patch(lora.tensors.pick({"head"})))
        before = _logits(live.model, inputs)
        live.load(lora.tensors)
        got = _logits(live.model, inputs)
    errors, moved = _errors(found), max(float((wanted - before).norm()), 1e-30)
    enough = int(np.argmax(errors <= SMALL))
    return Converted(lora, float(errors[min(rank, len(errors) - 1)]), float((got - wanted).norm()) / moved, enough)


class _Found(NamedTuple):
    """B (out, r) and A (r, in) of one layer, and the singular values of the whole change."""

    b: NDArray[np.float32]
    a: NDArray[np.float32]
    spectrum: NDArray[np.float64]


def _errors(found: Mapping[str, _Found]) -> NDArray[np.float64]:
    """The relative weight error over all layers, by rank from 0."""
    energies = np.zeros((len(found), 1 + max(len(part.spectrum) for part in found.values())))
    for row, part in zip(energies, found.values(), strict=True):
        row[: len(part.spectrum)] = part.spectrum**2
    tails = energies.sum(axis=0)[::-1].cumsum()[::-1]
    return np.asarray(np.sqrt(tails / tails[0]))


def _factors(model: nn.Module, plain: Mapping[str, Tensor], rank: int, adapter: Adapter) -> dict[str, _Found]:
    """The change of each linear layer, cut to ``rank``; layers that did not change are left out."""
    found = changes(model, plain, adapter.spec)
    return {one.name: _split(one.change.t(), rank) for one in found if not one.negligible}


def _split(change: Tensor, rank: int) -> _Found:
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    root = s[:rank].sqrt()
    b, a = (u[:, :rank] * root).float().cpu().numpy(), (root[:, None] * v[:rank]).float().cpu().numpy()
    return _Found(b, a, s.cpu().numpy())


def _adapter(base: Base, adapter: Adapter, found: Mapping[str, _Found], rank: int) -> Adapter:
    """The LoRA adapter with the factors in ``found``; a layer narrower than ``rank`` is filled up with zeros."""
    spec = make_spec(adapter.spec.task, base, Lora(r=rank, targets=tuple(found)), adapter.spec.head)
    named = Tensors.zeros(spec.layout).patch(adapter.tensors.pick({"head"})).named()
    for name, part in found.items():
        named[f"base_model.model.{name}.lora_B.weight"][:, : part.b.shape[1]] = part.b
        named[f"base_model.model.{name}.lora_A.weight"][: part.a.shape[0]] = part.a
    return Adapter(spec, Tensors.from_named(spec.layout, named))


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits.float()  # type: ignore[no-any-return]
