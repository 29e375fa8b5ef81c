"""What schemes for factored adapters share: which tensors multiply, what an adapter must have, public random signs."""

from __future__ import annotations

import hashlib
from math import prod

import numpy as np

from fedpeft.errors import AdapterError, UpdateError
from fedpeft.factors import Matrix, Pair, pairs
from fedpeft.schemes.optimizers import State
from fedpeft.tensors import Layout

PAIRS = (("B", "A"), ("B2", "A2"))


def matrices(layout: Layout, roles: tuple[str, str] = ("B", "A")) -> tuple[Pair, ...]:
    """The pairs of ``layout`` that multiply as matrices, (m, r) by (r, n); none where a method gives the roles another meaning."""
    try:
        return pairs(layout, roles) if "R" not in layout.roles else ()
    except AdapterError:
        return ()


def every_pair(layout: Layout, roles: frozenset[str]) -> tuple[Pair, ...]:
    """The pairs, first and second, both of whose roles are in ``roles``."""
    return tuple(pair for both in PAIRS if set(both) <= roles & layout.roles for pair in matrices(layout, both))


def require_roles(kind: str, layout: Layout, roles: frozenset[str], fix: str) -> None:
    """Refuse a layout without ``roles``. Raises `UpdateError` with ``fix``, the setting to change."""
    if not roles <= layout.roles:
        raise UpdateError(f"scheme {kind}: needs tensors of roles {sorted(roles)}, this adapter has {sorted(layout.roles)}; {fix}")


def require(kind: str, layout: Layout, roles: frozenset[str], fix: str) -> None:
    """Refuse a layout without ``roles``, or whose B and A do not multiply as matrices.

    Raises:
        UpdateError: with ``fix``, the setting to change.
    """
    require_roles(kind, layout, roles, fix)
    if not matrices(layout):
        raise UpdateError(f"scheme {kind}: A and B of this adapter do not multiply as matrices (out, r) by (r, in); {fix}")


def check_rank(kind: str, layout: Layout) -> None:
    """Refuse ranks beyond a module's width. Raises `UpdateError`."""
    for entry in layout.entries:
        rank = entry.shape[0] if entry.role == "A" else entry.shape[-1]
        if entry.role in ("A", "B") and rank > min(entry.shape):
            raise UpdateError(f"scheme {kind}: {entry.name} has rank {rank}, its module is {min(entry.shape)} wide; lower method.r")


def signs(seed: str, shape: tuple[int, ...]) -> Matrix:
    """Public random signs, +1 or -1: a function of ``seed`` alone, the same bits on every machine."""
    count = prod(shape)
    stream = np.frombuffer(hashlib.shake_256(seed.encode()).digest((count + 7) // 8), np.uint8)
    return np.unpackbits(stream, count=count).astype(np.float64).reshape(shape) * 2.0 - 1.0


def forget(state: State, roles: frozenset[str]) -> State:
    """``state`` without the moments of ``roles``: they belong to coordinates that are no more."""
    return {key: value for key, value in state.items() if key.split(".")[0] not in roles}
