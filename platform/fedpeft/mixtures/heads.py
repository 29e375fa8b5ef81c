"""Each row through its own task's classification head, whatever its number of labels.

The head's linear layers answer for every row with the weights of that row's task; rows with fewer labels than the longest of
the batch are filled up with minus infinity, so that softmax, argmax and cross-entropy are those of the row's own labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.values import PREFIX
from fedpeft.mixtures.dense import CHILD, Own, key_of, present
from fedpeft.mixtures.slabs import Slab
from fedpeft.mixtures.state import State

Weights = tuple[Tensor, Tensor | None]


def head_entries(slab: Slab, row: int) -> dict[str, dict[str, str]]:
    """Module name -> its own tensors (``weight``, ``bias``) -> their entries, of the head of the adapter in ``row``."""
    spec = slab.specs[row]
    assert spec is not None
    found: dict[str, dict[str, str]] = {}
    for entry in spec.layout.entries:
        if entry.role == "head":
            module, _, leaf = entry.name.removeprefix(PREFIX).removeprefix("base_model.").rpartition(".")
            found.setdefault(module, {})[leaf] = entry.name
    return found


class Heads(nn.Module):
    """The heads of all adapters at one linear layer: parameters that are views of their slabs."""

    def __init__(self, layer: nn.Linear, state: State) -> None:
        super().__init__()
        self.own: tuple[Tensor, Tensor | None] = (layer.weight, layer.bias)
        self.state = state
        self.held: dict[str, dict[str, nn.Parameter]] = {}

    def put(self, slab: Slab, row: int, entries: dict[str, str]) -> Own:
        """Take in the head of the adapter in ``row``; its parameters by entry."""
        spec, name = slab.specs[row], slab.names[row]
        assert spec is not None
        assert name is not None
        shapes = {entry.name: entry.shape for entry in spec.layout.entries}
        self.held[name] = {}
        for leaf, entry in entries.items():
            span = spec.layout.spans[entry]
            parameter = nn.Parameter(slab.values[row, span].view(shapes[entry]), requires_grad=slab.trained)
            parameter.grad = slab.grads[row, span].view(shapes[entry])
            self.held[name][leaf] = parameter
            self.register_parameter(key_of(slab, row, entry), parameter)
        return {entry: self.held[name][leaf] for leaf, entry in entries.items()}

    def drop(self, slab: Slab, row: int) -> None:
        """Forget the head of the adapter in ``row``."""
        gone = {id(parameter) for parameter in self.held.pop(slab.names[row] or "", {}).values()}
        for key in [key for key, parameter in self.named_parameters() if id(parameter) in gone]:
            delattr(self, key)

    def forward(self, x: Tensor, heads: Sequence[str | None]) -> Tensor:
        """X (B, ..., I) -> (B, ..., the most labels of any row)."""
        parts = [self._rows(x, rows, own) for own, rows in self._by_labels(heads)]
        widest = max(part.shape[-1] for part, _ in parts)
        filled = [part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part, _ in parts]
        if len(parts) > 1:
            places = torch.tensor([row for _, rows in parts for row in rows], device=x.device)
            filled = [torch.cat(filled).index_select(0, places.argsort())]
        resting = [p for name, own in self.held.items() if name not in heads for p in own.values()]
        return present(filled[0], resting) if self.state.dense else filled[0]

    def _by_labels(self, heads: Sequence[str | None]) -> list[tuple[list[Weights], list[int]]]:
        """The weights of rows with equally many labels, and the rows."""
        found: dict[int, tuple[list[Weights], list[int]]] = {}
        for row, name in enumerate(heads):
            held = self.held.get(name) if name is not None else None
            own = self.own if held is None else (held["weight"], held.get("bias"))
            weights, rows = found.setdefault(len(own[0]), ([], []))
            weights.append(own)
            rows.append(row)
        return list(found.values())

    def _rows(self, x: Tensor, rows: list[int], own: list[Weights]) -> tuple[Tensor, list[int]]:
        part = x if len(rows) == len(x) else x.index_select(0, torch.tensor(rows, device=x.device))
        y = torch.einsum("b...i,boi->b...o", part, torch.stack([weight for weight, _ in own]).to(x.dtype))
        biases = [bias for _, bias in own if bias is not None]
        if len(biases) == len(own):
            y = y + torch.stack(biases).to(y.dtype).view(len(rows), *[1] * (y.dim() - 2), -1)
        return y, rows


class HeadHost:
    """The forward of one linear layer of the head."""

    def __init__(self, name: str, layer: Any, state: State) -> None:
        if not isinstance(layer, nn.Linear):
            raise AdapterError(
                f"mixture: {name}, a part of the head, is a {type(layer).__name__}; rows may have heads of their own where these are "
                "linear layers alone; serve such tasks one at a time"
            )
        self.name, self.layer, self.state = name, layer, state
        self.heads = Heads(layer, state)
        object.__setattr__(layer, "forward", self)
        if state.dense:
            layer.add_module(CHILD, self.heads)

    def release(self) -> None:
        """Give the layer its own forward back."""
        object.__delattr__(self.layer, "forward")
        if self.state.dense:
            delattr(self.layer, CHILD)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Heads.forward`."""
        heads = self.state.heads
        if heads is None:
            raise AdapterError("mixture: no row has a head yet; name one adapter per row with use(gates, heads=[...])")
        if len(heads) != len(x):
            raise AdapterError(
                f"mixture: the head got {len(x)} rows, gates or heads are for {len(heads)}; set gates that fit the batch with use"
            )
        found: Tensor = self.heads(x, heads)
        return found
