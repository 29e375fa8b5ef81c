"""Leading singular vectors of M = B A by dense algebra of the rank R of the factors, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedpeft.factors.products import Matrix, Product

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding."""


class Leading(NamedTuple):
    """The leading left singular vectors ``u`` (m, s) of M, the ``image`` M'u (n, s), and the energy ||M||^2 of all of M."""

    u: Matrix
    image: Matrix
    total: float


def by_qr(whole: Product, rank: int) -> Leading:
    """QR of both factors, then an SVD of (R, R); accurate to the last digits for any spectrum. M may be of any shape and rank."""
    b, a = np.asarray(whole.b, np.float64), np.asarray(whole.a, np.float64)
    (qb, rb), (qa, ra) = np.linalg.qr(b), np.linalg.qr(a.T)
    u, values, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return Leading(qb @ u[:, :rank], (qa @ vt[:rank].T) * values[:rank], float(values @ values))


def by_gram(whole: Product, rank: int) -> Leading:
    """Two eigenproblems of (R, R): with A A' = F F', M has the singular values of B F, and their squares are those of F'(B'B)F.

    Only the vectors that are wanted are divided by their own values, so factors that sites share, or that depend on one another,
    do no harm. Values are good to 1e-8 of the largest.
    """
    b, a = np.asarray(whole.b, np.float64), np.asarray(whole.a, np.float64)
    values, vectors = np.linalg.eigh(a @ a.T)
    keep = values > np.finfo(np.float64).eps * values[-1]
    f = vectors[:, keep] * np.sqrt(values[keep])
    energies, turned = np.linalg.eigh(f.T @ (b.T @ b) @ f)
    keep = energies > NEGLIGIBLE**2 * energies[-1:]
    u = np.linalg.qr(b @ (f @ turned[:, keep][:, ::-1][:, :rank]))[0]
    return Leading(u, a.T @ (b.T @ u), float(energies[keep].sum()))
