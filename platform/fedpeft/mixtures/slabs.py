"""Where the values of many adapters lie: a slab holds adapters whose trained tensors lie at the same places, one a row.

A row is the adapter's flat vector in layout order, so that loading one is one copy; the tensors of one module over all rows
are a strided (T, ...) view, so that one batched product serves all adapters. Nothing is ever moved: when a slab is full, another is made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.mixtures.parts import Parts, parts_of
from fedpeft.tensors import Tensors

Key = tuple[Any, ...]
ALIGN = 64
"""Rows start at a multiple of so many values."""


class Pour(torch.autograd.Function):
    """A tensor whose gradient is added to a given one."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, sink: Tensor) -> Tensor:
        """The tensor as it is."""
        ctx.sink = sink
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """Autograd itself gets nothing."""
        ctx.sink += grad
        return None, None


@dataclass(eq=False)
class Slab:
    """Room for T adapters: ``values`` and ``grads`` (T, P), float32; ``specs`` says who lies in which row."""

    parts: Parts
    dropout: float
    values: Tensor
    grads: Tensor
    spans: dict[str, tuple[slice, tuple[int, ...]]]
    specs: list[AdapterSpec | None]
    names: list[str | None]
    fresh: set[int] = field(default_factory=set)
    """Rows that nobody has ever lain in, whose gradients are zero."""
    leaves: dict[str, Tensor] = field(default_factory=dict)
    trained: bool = True

    @property
    def capacity(self) -> int:
        """T."""
        return len(self.names)

    def stacked(self, name: str) -> Tensor:
        """The tensor ``name`` of all rows, (T, ...): a leaf that wants a gradient while the slab trains."""
        if name not in self.leaves:
            self.leaves[name] = self.view(name).requires_grad_(self.trained)
        return self.leaves[name]

    def view(self, name: str) -> Tensor:
        """The tensor ``name`` of all rows, (T, ...), outside autograd."""
        return _view(self.values, *self.spans[name])

    def factor(self, name: str) -> Tensor:
        """As `stacked`, for autograd's own functions: its gradient goes to `sink`."""
        return cast(Tensor, Pour.apply(self.stacked(name), self.sink(name)))  # type: ignore[no-untyped-call]

    def sink(self, name: str) -> Tensor:
        """Where the gradient of `stacked` belongs, (T, ...)."""
        return _view(self.grads, *self.spans[name])

    def train(self, wanted: bool) -> None:
        """Whether any row wants gradients from now on."""
        self.trained = wanted
        for leaf in self.leaves.values():
            leaf.requires_grad_(wanted)

    def write(self, row: int, name: str, adapter: Adapter) -> None:
        """Put ``adapter`` in ``row``: one copy; its gradient becomes zero."""
        self.names[row], self.specs[row] = name, adapter.spec
        self.flat(row).copy_(_source(adapter.tensors.flat))
        if row not in self.fresh:
            self.grads[row].zero_()
        self.fresh.discard(row)

    def flat(self, row: int) -> Tensor:
        """The values of one adapter (P,), a view."""
        return self.values[row, : self._size(row)]

    def grad(self, row: int) -> Tensor:
        """The gradients of one adapter (P,), a view."""
        return self.grads[row, : self._size(row)]

    def read(self, row: int) -> Tensors:
        """A copy of the values of one adapter."""
        spec = self.specs[row]
        assert spec is not None
        return Tensors(spec.layout, np.array(self.flat(row).detach().cpu().numpy(), copy=True))

    def _size(self, row: int) -> int:
        spec = self.specs[row]
        assert spec is not None
        return spec.layout.size


class Store:
    """All adapters of a bank by name, in slabs."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.slabs: list[Slab] = []
        self.place: dict[str, tuple[Slab, int]] = {}
        self._keys: dict[int, tuple[AdapterSpec, Key]] = {}
        self._by_key: dict[Key, list[Slab]] = {}

    def put(self, adapters: Sequence[tuple[str, Adapter]]) -> list[Slab]:
        """Take adapters in under new names; the slabs that had to be made for them."""
        made: list[Slab] = []
        groups: dict[Key, list[tuple[str, Adapter]]] = {}
        for name, adapter in adapters:
            groups.setdefault(self._key(adapter.spec), []).append((name, adapter))
        for key, group in groups.items():
            width = max(adapter.spec.layout.size for _, adapter in group)
            made += self._reserve(key, group[0][1].spec, len(group), width)
            for (name, adapter), (slab, row) in zip(group, self._free(key, width), strict=False):
                slab.write(row, name, adapter)
                self.place[name] = (slab, row)
        return made

    def remove(self, name: str) -> tuple[Slab, bool]:
        """Free the row of ``name``; its slab, and whether that is gone because nobody lies in it any more."""
        slab, row = self.place.pop(name)
        slab.names[row], slab.specs[row] = None, None
        gone = all(held is None for held in slab.names)
        if gone:
            self.slabs.remove(slab)
            self._by_key = {key: [other for other in slabs if other is not slab] for key, slabs in self._by_key.items()}
        return slab, gone

    def rows(self, names: Collection[str]) -> dict[int, tuple[Slab, list[tuple[str, int]]]]:
        """The slabs that hold ``names``, by id, with (name, row) in the order given."""
        found: dict[int, tuple[Slab, list[tuple[str, int]]]] = {}
        for name in names:
            slab, row = self.place[name]
            found.setdefault(id(slab), (slab, []))[1].append((name, row))
        return found

    def _free(self, key: Key, width: int) -> list[tuple[Slab, int]]:
        slabs = [slab for slab in self._by_key.get(key, []) if slab.values.shape[1] >= width]
        return [(slab, row) for slab in slabs for row, held in enumerate(slab.names) if held is None]

    def _reserve(self, key: Key, spec: AdapterSpec, count: int, width: int) -> list[Slab]:
        """Make sure that ``count`` rows of ``width`` values are free; a new slab doubles the room that there is."""
        slabs, free = self._by_key.setdefault(key, []), len(self._free(key, width))
        if count <= free:
            return []
        rows = max(count - free, sum(slab.capacity for slab in slabs))
        slab = _slab(spec, rows, count - free, -(-width // ALIGN) * ALIGN, self.device)
        slabs.append(slab)
        self.slabs.append(slab)
        return [slab]

    def _key(self, spec: AdapterSpec) -> Key:
        """Equal for adapters that may share a slab."""
        known = self._keys.get(id(spec.layout))
        if known is None or known[0].layout is not spec.layout or known[0].method != spec.method:
            places = tuple((e.name, e.shape, spec.layout.spans[e.name].start) for e in spec.layout.entries if e.role != "head")
            key = (spec.method.kind, _dropout(spec), getattr(spec.method, "top", 0), places)
            known = self._keys[id(spec.layout)] = (spec, key)
        return known[1]


def _slab(spec: AdapterSpec, rows: int, count: int, width: int, device: torch.device | str) -> Slab:
    """Room for ``rows`` adapters, of which the first ``count`` are written next."""
    spans = {e.name: (spec.layout.spans[e.name], e.shape) for e in spec.layout.entries if e.role != "head"}
    values, grads = torch.empty(rows, width, device=device), _zeros(rows, width, device)
    values[count:].zero_()  # ways may read rows that nobody lies in, with weight 0
    return Slab(parts_of(spec), _dropout(spec), values, grads, spans, [None] * rows, [None] * rows, set(range(rows)))


def _zeros(rows: int, width: int, device: torch.device | str) -> Tensor:
    """On a CPU as numpy makes them: memory that the system hands out zeroed, page by page as it is touched; torch writes them all."""
    if torch.device(device).type != "cpu":
        return torch.zeros(rows, width, device=device)
    return torch.from_numpy(np.zeros((rows, width), np.float32))


def _dropout(spec: AdapterSpec) -> float:
    return float(getattr(spec.method, "dropout", 0.0))


def _view(flat: Tensor, span: slice, shape: tuple[int, ...]) -> Tensor:
    return flat.detach()[:, span].view(len(flat), *shape)


def _source(flat: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(flat if flat.flags.writeable else flat.copy())
