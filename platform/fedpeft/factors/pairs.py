"""Which two tensors of a layout multiply."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.errors import AdapterError
from fedpeft.factors.products import Product
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class Pair:
    """The names of two tensors of one module that multiply: ``b`` (m, r) and ``a`` (r, n)."""

    b: str
    a: str


def pairs(layout: Layout, roles: tuple[str, str] = ("B", "A")) -> tuple[Pair, ...]:
    """The pairs of ``layout``, by module in the layout's order; ``roles`` are those of the left and of the right factor.

    Raises:
        AdapterError: the roles do not have the same modules, or two factors do not fit one another.
    """
    left, right = ({_module(e.name, role): e for e in layout.entries if e.role == role} for role in roles)
    if set(left) != set(right):
        raise AdapterError(f"layout: roles {roles} have different modules: {sorted(set(left) ^ set(right))[:3]}")
    for module, b in left.items():
        a = right[module]
        if len(b.shape) != 2 or len(a.shape) != 2 or b.shape[1] != a.shape[0]:
            raise AdapterError(f"layout: {b.name} {list(b.shape)} and {a.name} {list(a.shape)} are no factors (m, r) and (r, n)")
    return tuple(Pair(left[module].name, right[module].name) for module in left)


def products(tensors: Tensors, roles: tuple[str, str] = ("B", "A")) -> dict[Pair, Product]:
    """The products of ``tensors`` by pair, as views of its buffer. Raises `AdapterError` as `pairs` does."""
    named = tensors.named()
    return {pair: Product(named[pair.b], named[pair.a]) for pair in pairs(tensors.layout, roles)}


def _module(name: str, role: str) -> str:
    """``name`` without its last mention of ``lora_<role>``, or of ``<role>``."""
    for mark in (f"lora_{role}", role):
        head, found, tail = name.rpartition(mark)
        if found:
            return f"{head}*{tail}"
    return name
