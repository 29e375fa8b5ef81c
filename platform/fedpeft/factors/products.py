"""The space of products B A, worked in through the factors: sums, norms and inner products.

Two factors are fixed only up to ``(B R, R^-1 A)``, so lengths and angles of LoRA adapters mean something between products alone.
``<B_i A_i, B_j A_j> = tr((B_j' B_i)(A_i A_j'))`` costs r^2 (m + n), and the product of shape (m, n) is never formed.
All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError

Factor = NDArray[np.floating[Any]]
"""A factor of float32 or float64."""
Matrix = NDArray[np.float64]


class Product(NamedTuple):
    """``b`` (m, r) times ``a`` (r, n); any weight is part of a factor."""

    b: Factor
    a: Factor


def scaled(x: Product, factor: float) -> Product:
    """``x`` times ``factor``."""
    return Product(x.b * x.b.dtype.type(factor), x.a)


def stack(xs: Sequence[tuple[Factor, Factor]]) -> Product:
    """The sum of ``xs`` as one product whose rank is the sum of theirs.

    Raises:
        AdapterError: there are none, or their shapes do not fit.
    """
    if not xs:
        raise AdapterError("product: nothing to add; give at least one product")
    shapes = {(b.shape[0], a.shape[1]) for b, a in xs}
    if len(shapes) > 1 or any(b.shape[1] != a.shape[0] or not a.shape[0] for b, a in xs):
        raise AdapterError(f"product: factors {[(b.shape, a.shape) for b, a in xs][:3]} cannot be added; are all of one module?")
    return Product(np.concatenate([b for b, _ in xs], axis=1), np.concatenate([a for _, a in xs], axis=0))


def difference(x: Product, y: Product) -> Product:
    """``x - y``, of the rank of both together."""
    return stack([x, scaled(y, -1.0)])


def inner(x: tuple[Factor, Factor], y: tuple[Factor, Factor]) -> float:
    """The Frobenius inner product of the two products."""
    (xb, xa), (yb, ya) = _doubled(x), _doubled(y)
    return float(np.vdot(yb.T @ xb, ya @ xa.T))


def norm(x: tuple[Factor, Factor]) -> float:
    """The Frobenius norm of the product."""
    return sqrt(max(inner(x, x), 0.0))


def gram(xs: Sequence[tuple[Factor, Factor]]) -> Matrix:
    """All inner products (K, K) of K products of one shape, whatever their ranks; symmetric bit for bit.

    Raises:
        AdapterError: there are none, or their shapes do not fit.
    """
    b, a = _doubled(stack(xs))
    starts = np.cumsum([0, *(x[0].shape[1] for x in xs[:-1])])
    table = (b.T @ b) * (a @ a.T)
    sums = np.add.reduceat(np.add.reduceat(table, starts, axis=0), starts, axis=1)
    return np.asarray((sums + sums.T) / 2)


def _doubled(x: tuple[Factor, Factor]) -> tuple[Matrix, Matrix]:
    return np.asarray(x[0], np.float64), np.asarray(x[1], np.float64)
