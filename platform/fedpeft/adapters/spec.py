"""What an adapter is, as plain values: method, base, head, layout, and the hash that travels for them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError, BaseError
from fedpeft.methods.protocol import Method
from fedpeft.tensors import Layout, Tensors

KEYS = frozenset({"task", "base", "base_model", "method", "head", "layout"})


@dataclass(frozen=True)
class AdapterSpec:
    """One task's method and head on one base: ``base`` is the fingerprint's identity, ``base_model`` what people call it.

    ``images``: the base reads images, which peft and transformers must be told of in what is exported.
    """

    task: str
    base: str
    base_model: str
    method: Method
    head: HeadSpec
    layout: Layout
    images: bool = False

    @cached_property
    def schema(self) -> str:
        """SHA-256 over method, head, layout and base: equal exactly when two adapters may be averaged."""
        table = self.to_json()
        return _digest({key: table[key] for key in ("method", "head", "layout", "base")})

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back."""
        return {
            "task": self.task,
            "base": self.base,
            "base_model": self.base_model,
            "method": describe(self.method),
            "head": {"kind": self.head.kind, "labels": list(self.head.labels)},
            "layout": self.layout.to_json(),
            **({"images": True} if self.images else {}),
        }

    @staticmethod
    def from_json(table: dict[str, Any]) -> AdapterSpec:
        """Inverse of `to_json`. Raises `AdapterError` naming what is missing, unknown or malformed."""
        from fedpeft.methods import METHODS

        if not isinstance(table, dict) or set(table) - {"images"} != KEYS:
            seen = sorted(table) if isinstance(table, dict) else type(table).__name__
            raise AdapterError(f"adapter spec: has {seen}, needs exactly {sorted(KEYS)}; was it written by another version of fedpeft?")
        try:
            return AdapterSpec(
                task=str(table["task"]),
                base=str(table["base"]),
                base_model=str(table["base_model"]),
                method=build(METHODS, table["method"], "method"),
                head=HeadSpec(table["head"]["kind"], tuple(str(label) for label in table["head"]["labels"])),
                layout=_checked(Layout.from_json(table["layout"])),
                images=table.get("images", False) is True,
            )
        except (KeyError, TypeError, ValueError, AttributeError, BaseError) as fault:
            raise AdapterError(f"adapter spec: malformed: {type(fault).__name__}: {fault}; fetch the adapter again") from None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A spec and its values. Raises `AdapterError` when the tensors are of another layout."""

    spec: AdapterSpec
    tensors: Tensors

    def __post_init__(self) -> None:
        if self.tensors.layout != self.spec.layout:
            raise AdapterError(
                f"adapter {self.spec.task}: the tensors are of another layout than the spec; was it made for another base or rank?"
            )

    @property
    def digest(self) -> str:
        """SHA-256 over task, schema and values; no clock, path or machine enters it."""
        return _digest({"task": self.spec.task, "schema": self.spec.schema, "tensors": self.tensors.digest})


def entry_seed(seed: int, name: str) -> list[int]:
    """Seed material of one tensor, from the adapter's seed and the tensor's name, so that values do not depend on order."""
    return [seed, *hashlib.sha256(name.encode()).digest()]


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checked(layout: Layout) -> Layout:
    bad = [e.name for e in layout.entries if not all(type(n) is int and n > 0 for n in e.shape)]
    if bad:
        raise ValueError(f"tensors {bad[:3]} have a size that is no positive whole number")
    if not all(isinstance(e.name, str) and isinstance(e.role, str) for e in layout.entries):
        raise ValueError("names and roles of tensors must be texts")
    return layout
