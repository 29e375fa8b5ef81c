"""The weights of linear layers read off the layers themselves, with and without an adapter: identity rows go through them.

So nothing is asked of a method but that the layer stays affine, and one layer's (out, in) change is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.errors import AdapterError
from fedpeft.methods.targets import linear_roles

Forward = Callable[[Tensor], Tensor]
AFFINE = 1e-3
"""Largest relative departure from an affine layer that is taken for rounding (quantized layers round their inputs)."""
NEGLIGIBLE = 1e-7
PROBES = 8


class Change(NamedTuple):
    """One linear layer: its name, itself, its own weight transposed (in, out) as it computes with it, and what an adapter adds to that."""

    name: str
    layer: Any
    before: Tensor
    change: Tensor

    @property
    def negligible(self) -> bool:
        """Whether the adapter leaves the layer as it is, up to rounding."""
        return float(self.change.norm()) <= NEGLIGIBLE * float(self.before.norm())


def probes(shell: nn.Module) -> dict[str, Tensor]:
    """What a few fixed rows become in each linear layer of a shell without adapter; `changes` compares with it."""
    return {name: _rows(shell.get_submodule(name)) for name in linear_roles(shell)}


def changes(model: nn.Module, plain: Mapping[str, Tensor], spec: AdapterSpec) -> Iterator[Change]:
    """Every linear layer of ``model``, which carries the adapter of ``spec``; ``plain`` is what `probes` gave without it.

    Raises:
        AdapterError: the adapter acts elsewhere, rewrites a layer in place, or makes it non-linear.
    """
    who = f"adapter {spec.task}: {spec.method.kind}"
    for name, probe in plain.items():
        layer = _layer(model, name, who)
        bare = bare_of(layer)
        if not torch.allclose(_rows(bare, bare.forward), probe, rtol=1e-4, atol=1e-5):
            raise AdapterError(f"{who} rewrites {name} in place, so its change cannot be read; merge it with its own library first")
        before, after = _matrix(layer, bare.forward), _matrix(layer, layer)
        change, scale = after - before, float(before.norm())
        bend = float((_rows(layer) - _rows(layer, bare.forward) - _probe(layer) @ change).norm())
        if bend > AFFINE * max(float(change.norm()), scale):
            raise AdapterError(
                f"{who} makes {name} non-linear (off by {bend:.2g}), which no weight can say; serve it with fedpeft as it is"
            )
        yield Change(name, layer, before, change)


def bare_of(layer: Any) -> Any:
    """The base's own layer inside an adapter's."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _layer(model: nn.Module, name: str, who: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"{who} acts outside the linear layers (prompts, caches), which no LoRA can say; serve it with fedpeft"
        ) from None


def _width(layer: Any) -> int:
    bare = bare_of(layer)
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
