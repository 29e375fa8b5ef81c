"""Named tensors in one flat buffer: the layout, its fingerprint, and the arithmetic on it.

All tensors of an adapter lie one after the other in a single float32 vector, ordered by role and then by name, so that
the tensors of one role (all ``lora_B``, say) are one contiguous slice. What trains and travels in a round is then a
handful of slices, and no Python runs per tensor between optimiser and socket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError

Flat = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Entry:
    """One tensor of a layout: its role (``A``, ``B``, ``head``, ``bias``, ...), its name in PEFT's key form, its shape."""

    role: str
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat vector; entries are sorted by (role, name) and names are unique."""

    entries: tuple[Entry, ...]

    @staticmethod
    def of(entries: Collection[Entry]) -> Layout:
        """Sort ``entries`` into a layout. Raises `AdapterError` when two tensors share a name."""
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise AdapterError(f"layout: tensors {twice} appear twice; names must be unique")
        return Layout(tuple(sorted(entries)))

    @cached_property
    def size(self) -> int:
        """Number of float32 values of the flat vector."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def roles(self) -> frozenset[str]:
        """The roles present."""
        return frozenset(entry.role for entry in self.entries)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names in storage order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def spans(self) -> dict[str, slice]:
        """The slice of the flat vector that each named tensor occupies."""
        spans, start = {}, 0
        for entry in self.entries:
            spans[entry.name] = slice(start, start + entry.size)
            start += entry.size
        return spans

    @cached_property
    def role_spans(self) -> dict[str, slice]:
        """The contiguous slice of each role."""
        spans: dict[str, slice] = {}
        for entry in self.entries:
            span = self.spans[entry.name]
            spans[entry.role] = slice(spans[entry.role].start if entry.role in spans else span.start, span.stop)
        return spans

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over roles, names and shapes: equal exactly when two flat vectors may be added."""
        rows = [[entry.role, entry.name, list(entry.shape)] for entry in self.entries]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def subset(self, roles: Collection[str]) -> Layout:
        """The layout of the tensors whose role is in ``roles``."""
        return Layout(tuple(entry for entry in self.entries if entry.role in roles))

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON form that `from_json` reads back."""
        return [{"role": e.role, "name": e.name, "shape": list(e.shape)} for e in self.entries]

    @staticmethod
    def from_json(rows: list[dict[str, Any]]) -> Layout:
        """Inverse of `to_json`."""
        return Layout.of([Entry(row["role"], row["name"], tuple(row["shape"])) for row in rows])


@dataclass(frozen=True, eq=False)
class Tensors:
    """A layout and its values: ``flat`` is a contiguous float32 vector of ``layout.size`` values.

    Laws (tested): ``+`` is commutative, ``(a + b) - b`` is ``a`` up to rounding, ``t.patch(t.pick(roles))`` equals ``t``.
    """

    layout: Layout
    flat: Flat

    def __post_init__(self) -> None:
        if self.flat.dtype != np.float32 or self.flat.shape != (self.layout.size,):
            raise AdapterError(
                f"tensors: flat buffer is {self.flat.dtype}{list(self.flat.shape)}, "
                f"the layout needs float32[{self.layout.size}]; was it made for another adapter?"
            )

    @staticmethod
    def zeros(layout: Layout) -> Tensors:
        """All zeros."""
        return Tensors(layout, np.zeros(layout.size, np.float32))

    @staticmethod
    def from_named(layout: Layout, named: Mapping[str, NDArray[Any]]) -> Tensors:
        """Copy ``named`` arrays into a new flat buffer. Raises `AdapterError` on a missing, extra or misshapen tensor."""
        missing, extra = sorted(set(layout.names) - set(named)), sorted(set(named) - set(layout.names))
        if missing or extra:
            raise AdapterError(f"tensors: missing {missing[:4]}, unexpected {extra[:4]}; the adapter is of another method or base")
        out = Tensors.zeros(layout)
        for name, view in out.named().items():
            if view.shape != tuple(named[name].shape):
                raise AdapterError(f"tensors: {name} has shape {list(named[name].shape)}, the layout needs {list(view.shape)}")
            view[...] = named[name]
        return out

    def named(self) -> dict[str, NDArray[np.float32]]:
        """Views of the buffer by name, in storage order; writing to one writes to the buffer."""
        return {e.name: self.flat[self.layout.spans[e.name]].reshape(e.shape) for e in self.layout.entries}

    def pick(self, roles: Collection[str]) -> Tensors:
        """A copy of the tensors whose role is in ``roles``."""
        part = self.layout.subset(roles)
        spans = [self.layout.role_spans[role] for role in sorted(part.roles)]
        return Tensors(part, np.concatenate([self.flat[span] for span in spans]) if spans else np.zeros(0, np.float32))

    def patch(self, part: Tensors) -> Tensors:
        """A copy in which the roles of ``part`` are replaced. Raises `AdapterError` when ``part`` is of another layout."""
        if part.layout != self.layout.subset(part.layout.roles):
            raise AdapterError("tensors: the part to write is not a subset of this layout; was it made for another adapter?")
        flat = self.flat.copy()
        for role, span in part.layout.role_spans.items():
            flat[self.layout.role_spans[role]] = part.flat[span]
        return Tensors(self.layout, flat)

    def __add__(self, other: Tensors) -> Tensors:
        self._check(other)
        return Tensors(self.layout, self.flat + other.flat)

    def __sub__(self, other: Tensors) -> Tensors:
        self._check(other)
        return Tensors(self.layout, self.flat - other.flat)

    def scaled(self, factor: float) -> Tensors:
        """Every value times ``factor``."""
        return Tensors(self.layout, self.flat * np.float32(factor))

    def norm(self) -> float:
        """Euclidean norm of all values together, accumulated in float64."""
        return float(np.linalg.norm(self.flat.astype(np.float64)))

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return bool(np.isfinite(self.flat).all())

    @property
    def digest(self) -> str:
        """SHA-256 of layout and little-endian values."""
        hasher = hashlib.sha256(self.layout.fingerprint.encode())
        hasher.update(np.ascontiguousarray(self.flat, "<f4").data)
        return hasher.hexdigest()

    def _check(self, other: Tensors) -> None:
        if self.layout != other.layout:
            raise AdapterError("tensors: two different layouts cannot be combined; are both of one method on one base?")
