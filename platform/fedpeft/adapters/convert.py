"""Any adapter that changes linear layers, as a plain LoRA that every server takes; what is lost is measured and said.

The weight change of a layer is read off the layer itself: identity rows go through it with and without the adapter. So the
conversion asks nothing of the method but that the layer stays affine, and one layer's (out, in) change is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.adapters.live import Live
from fedpeft.adapters.making import make_spec
from fedpeft.adapters.spec import Adapter
from fedpeft.bases.base import Base
from fedpeft.errors import AdapterError
from fedpeft.methods.lora import Lora
from fedpeft.methods.targets import linear_roles
from fedpeft.tensors import Tensors

Forward = Callable[[Tensor], Tensor]

AFFINE = 1e-3
"""Largest relative departure from an affine layer that is taken for rounding (quantized layers round their inputs)."""
NEGLIGIBLE = 1e-7
PROBES = 8


@dataclass(frozen=True)
class Converted:
    """The LoRA, the share of the weight change that its rank lost, and how far its logits are from the original's.

    ``weight_error`` is ||dW - B A|| / ||dW|| over all layers; ``output_error`` the distance of logits over the distance that the
    original moves them from the base's, on random tokens: what no weight of a linear layer can say shows there.
    """

    adapter: Adapter
    weight_error: float
    output_error: float


def to_lora(base: Base, adapter: Adapter, rank: int) -> Converted:
    """The best LoRA of ``rank`` for what ``adapter`` does to the linear layers of ``base``.

    Raises:
        AdapterError: the adapter is of another base, leaves the linear layers as they are, or makes one of them non-linear.
    """
    shell = base.shell(adapter.spec.head)
    plain = {name: _rows(shell.get_submodule(name)) for name in linear_roles(shell)}
    tokens = torch.randint(5, int(base.config.vocab_size), (4, 16), generator=torch.Generator().manual_seed(0)).to(base.device)
    with Live.attach(base, adapter.spec) as live:
        live.load(adapter.tensors)
        live.model.eval()
        wanted, found = _logits(live.model, tokens), _factors(live.model, plain, rank, adapter)
    if not found:
        raise AdapterError(
            f"adapter {adapter.spec.task}: {adapter.spec.method.kind} changes no weight of a linear layer; serve it with fedpeft as it is"
        )
    lora = _adapter(base, adapter, found, rank)
    with Live.attach(base, lora.spec) as live:
        live.load(Tensors.zeros(lora.spec.layout).patch(lora.tensors.pick({"head"})))
        before = _logits(live.model, tokens)
        live.load(lora.tensors)
        got = _logits(live.model, tokens)
    lost, whole = sum(part.lost for part in found.values()), sum(part.whole for part in found.values())
    moved = max(float((wanted - before).norm()), 1e-30)
    return Converted(lora, float(np.sqrt(lost / whole)), float((got - wanted).norm()) / moved)


class _Found(NamedTuple):
    """B (out, r) and A (r, in) of one layer, the energy that they miss and the energy of the whole change."""

    b: NDArray[np.float32]
    a: NDArray[np.float32]
    lost: float
    whole: float


def _factors(model: nn.Module, plain: Mapping[str, Tensor], rank: int, adapter: Adapter) -> dict[str, _Found]:
    """The change of each linear layer, cut to ``rank``; layers that did not change are left out."""
    who, found = f"adapter {adapter.spec.task}: {adapter.spec.method.kind}", {}
    for name, probe in plain.items():
        layer = _layer(model, name, who)
        bare = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if not torch.allclose(_rows(bare, bare.forward), probe, rtol=1e-4, atol=1e-5):
            raise AdapterError(f"{who} rewrites {name} in place, so its change cannot be read; merge it with its own library first")
        before, after = _matrix(layer, bare.forward), _matrix(layer, layer)
        change, scale = (after - before).t(), float(before.norm())
        bend = float((_rows(layer) - _rows(layer, bare.forward) - _probe(layer) @ change.t()).norm())
        if bend > AFFINE * max(float(change.norm()), scale):
            raise AdapterError(f"{who} makes {name} non-linear (off by {bend:.2g}), which no LoRA can say; serve it with fedpeft as it is")
        if float(change.norm()) > NEGLIGIBLE * scale:
            found[name] = _split(change, rank)
    return found


def _layer(model: nn.Module, name: str, who: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"{who} acts outside the linear layers (prompts, caches), which no LoRA can say; serve it with fedpeft"
        ) from None


def _width(layer: Any) -> int:
    bare = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return int(bare.nx if hasattr(bare, "nx") else bare.in_features)


def _probe(layer: Any) -> Tensor:
    """A few fixed rows (N, in) on the layer's device."""
    rows = torch.randn(PROBES, _width(layer), generator=torch.Generator().manual_seed(1))
    return rows.to(next(layer.parameters()).device)


@torch.no_grad()
def _through(layer: Any, rows: Tensor, forward: Forward | None) -> Tensor:
    """What ``forward`` (the layer with its hooks, when None) makes of ``rows`` beyond what it makes of zero: (N, out), float32."""
    weight = next(layer.parameters())
    inputs = torch.cat([torch.zeros_like(rows[:1]), rows]).to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)
    out: Tensor = (forward or layer)(inputs[None])[0].float()
    return out[1:] - out[0]


def _rows(layer: Any, forward: Forward | None = None) -> Tensor:
    return _through(layer, _probe(layer), forward)


def _matrix(layer: Any, forward: Forward) -> Tensor:
    """The transposed weight (in, out) of an affine layer."""
    return _through(layer, torch.eye(_width(layer), device=_probe(layer).device), forward)


def _split(change: Tensor, rank: int) -> _Found:
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    kept, root = s[:rank], s[:rank].sqrt()
    b, a = (u[:, :rank] * root).float().cpu().numpy(), (root[:, None] * v[:rank]).float().cpu().numpy()
    return _Found(b, a, float((s[len(kept) :] ** 2).sum()), float((s**2).sum()))


def _adapter(base: Base, adapter: Adapter, found: Mapping[str, _Found], rank: int) -> Adapter:
    """The LoRA adapter with the factors in ``found``; a layer narrower than ``rank`` is filled up with zeros."""
    spec = make_spec(adapter.spec.task, base, Lora(r=rank, targets=tuple(found)), adapter.spec.head)
    named = Tensors.zeros(spec.layout).patch(adapter.tensors.pick({"head"})).named()
    for name, part in found.items():
        named[f"base_model.model.{name}.lora_B.weight"][:, : part.b.shape[1]] = part.b
        named[f"base_model.model.{name}.lora_A.weight"][: part.a.shape[0]] = part.a
    return Adapter(spec, Tensors.from_named(spec.layout, named))


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    decoder = {"decoder_input_ids": tokens} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **decoder).logits.float()  # type: ignore[no-any-return]
