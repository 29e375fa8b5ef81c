"""Inner products of what the sites change in a product ``B A`` of which both factors move, taken through the factors.

Site i changes ``(B + dB_i)(A + dA_i) - B A = dB_i (A + dA_i) + B dA_i``. B and A are the same for all sites, so the tables
``[B, dB_1, ..]' [B, dB_1, ..]`` and ``[A; dA_1; ..] [A; dA_1; ..]'`` hold all that is needed; a fourth of the work of a Gram matrix of
products of rank 2r.

B (m, r), A (r, k), dB (n, m, r), dA (n, r, k); p and q run over ranks, i and j over sites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.factors import Matrix

Table = NDArray[np.floating[Any]]


def inner_changes(b: Table, a: Table, db: Table, da: Table) -> Matrix:
    """Inner products (n, n) of the sites' changes; the tables are in the type of the arguments, their sums in float64."""
    sites, rank = db.shape[0] + 1, b.shape[1]
    left, right = np.concatenate([b[None], db]), np.concatenate([a[None], da]).reshape(sites * rank, -1)
    left = left.transpose(1, 0, 2).reshape(-1, sites * rank)
    b_ipjq = (left.T @ left).reshape(sites, rank, sites, rank)
    a_ipjq = (right @ right.T).reshape(sites, rank, sites, rank)
    once = a_ipjq[1:, :, 1:] + a_ipjq[:1, :, 1:]
    twice = once + a_ipjq[1:, :, :1] + a_ipjq[:1, :, :1]
    same = np.einsum("ipjq,ipjq->ij", b_ipjq[1:, :, 1:], twice, dtype=np.float64)
    cross = np.einsum("ipq,ipjq->ij", b_ipjq[1:, :, 0], once, dtype=np.float64)
    still = np.einsum("pq,ipjq->ij", b_ipjq[0, :, 0], a_ipjq[1:, :, 1:], dtype=np.float64)
    return np.asarray(same + cross + cross.T + still)


def growth_of_changes(b: Table, a: Table, db: Table, da: Table) -> Matrix:
    """Coefficients (n, 3) of s^2, s^3 and s^4 in the squared length of the change by ``s dB_i`` and ``s dA_i``."""
    bb, ad = b.T @ b, a @ da.transpose(0, 2, 1)
    db_db, db_b, da_da = db.transpose(0, 2, 1) @ db, db.transpose(0, 2, 1) @ b, da @ da.transpose(0, 2, 1)
    linear = _dot(db_db, a @ a.T) + 2.0 * _dot(db_b, ad) + _dot(bb, da_da)
    mixed = _dot(db_db, ad) + _dot(db_b.transpose(0, 2, 1), da_da)
    return np.stack([linear, 2.0 * mixed, _dot(db_db, da_da)], axis=1)


def _dot(x: Table, y: Table) -> Matrix:
    return np.asarray((x * y).sum(axis=(1, 2)), np.float64)
