"""Factors of one matrix, in float64; numpy alone.

Shape legend: W (m, n), r rank; factors are b (m, r) and a (r, n).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Factors = tuple[Matrix, Matrix]

EXACT = 1024
"""Up to this smaller side a matrix is decomposed whole; beyond it by subspace iteration, whose cost is (m n r)."""


def singular(w: NDArray[Any], rank: int, rng: np.random.Generator) -> tuple[Matrix, Matrix, Matrix]:
    """The ``rank`` largest singular triples: u (m, r), s (r,), v (r, n); the largest entry of each column of u is positive."""
    w = np.asarray(w, np.float64)
    basis = None if min(w.shape) <= EXACT else _range(w, rank, rng)
    u, s, v = np.linalg.svd(w if basis is None else basis.T @ w, full_matrices=False)
    u = u[:, :rank] if basis is None else basis @ u[:, :rank]
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    return u * signs, s[:rank], signs[:, None] * v[:rank]


def balanced(w: NDArray[Any], rank: int, rng: np.random.Generator) -> Factors:
    """The best approximation of ``rank``, b = u sqrt(s), a = sqrt(s) v."""
    u, s, v = singular(w, rank, rng)
    root = np.sqrt(s)
    return u * root, root[:, None] * v


def orthonormal(w: NDArray[Any], rank: int) -> Factors:
    """The first ``rank`` columns of Q and rows of R in w = Q R."""
    w = np.asarray(w, np.float64)
    q, _ = np.linalg.qr(w[:, :rank])
    return q, q.T @ w


def weighted(w: NDArray[Any], covariance: Matrix, rank: int, largest: bool) -> Factors:
    """The ``rank`` largest or smallest components of w C, taken back by C^-1; C is damped until it can be inverted well."""
    c = covariance + 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    u, s, v = np.linalg.svd(np.asarray(w, np.float64) @ c, full_matrices=False)
    part = slice(rank) if largest else slice(len(s) - rank, len(s))
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    root = np.sqrt(s[part])
    return (u * signs)[:, part] * root, root[:, None] * np.linalg.solve(c, (signs[:, None] * v)[part].T).T


def _range(w: Matrix, rank: int, rng: np.random.Generator, rounds: int = 8) -> Matrix:
    """An orthonormal basis (m, r + 16) of where w's largest singular vectors lie (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)."""
    width = min(rank + 16, *w.shape)
    q, _ = np.linalg.qr(w @ rng.standard_normal((w.shape[1], width)))
    for _ in range(rounds):
        back, _ = np.linalg.qr(w.T @ q)
        q, _ = np.linalg.qr(w @ back)
    return np.asarray(q, np.float64)
