"""Products of two factors, kept as factors: pairs of a layout's roles, sums of products, norms and inner products. No torch.

Nothing here forms the product of shape (m, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.tensors import Layout

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """The names of two tensors of one module that multiply: ``b`` (m, r) and ``a`` (r, n)."""

    b: str
    a: str


def pairs(layout: Layout, roles: tuple[str, str] = ("B", "A")) -> tuple[Pair, ...]:
    """The pairs of ``layout``, by module in the layout's order; ``roles`` are those of the left and of the right factor.

    Raises:
        AdapterError: the roles do not have the same modules.
    """
    left, right = ({_module(e.name, role): e.name for e in layout.entries if e.role == role} for role in roles)
    if set(left) != set(right):
        raise AdapterError(f"layout: roles {roles} have different modules: {sorted(set(left) ^ set(right))[:3]}")
    return tuple(Pair(left[module], right[module]) for module in left)


def _module(name: str, role: str) -> str:
    """``name`` without its last mention of ``lora_<role>``, or of ``<role>``."""
    for mark in (f"lora_{role}", role):
        head, found, tail = name.rpartition(mark)
        if found:
            return f"{head}*{tail}"
    return name
