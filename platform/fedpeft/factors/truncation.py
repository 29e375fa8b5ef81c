"""The best product of rank r for a sum of products, through the factors: no matrix of shape (m, n) is ever formed.

FlexLoRA (Bai et al. 2024, arXiv 2402.11505) forms the sum and takes its SVD; its factors give the same answer.

- ``qr``: QR of both stacks, then an SVD of (R, R), R being the sum of the ranks. The reference.
- ``gram``: two eigenproblems of (R, R) in float64; the fastest for small R.
- ``krylov``: products with the factors alone, until what further steps can add is below 6e-7 of ||M||; the fastest for large R.
  A spectrum that is too flat for it goes to ``gram``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedpeft.errors import AdapterError
from fedpeft.factors.krylov import OVERSAMPLE, by_krylov
from fedpeft.factors.leading import NEGLIGIBLE, Leading, by_gram, by_qr
from fedpeft.factors.products import Factor, Product, norm, stack

How = Literal["auto", "qr", "gram", "krylov"]
Split = Literal["balanced", "left"]
BLOCKS = 8
"""``auto`` takes ``krylov`` above a stack of so many blocks of ``rank + OVERSAMPLE`` (measured at m = n = 384, 1024 and 4096)."""


class Truncated(NamedTuple):
    """``b`` (m, r) times ``a`` (r, n), largest singular value first, and the share of ||M||^2 that was dropped.

    Columns beyond the rank of M are zero. ``lost`` is exact under ``qr`` and ``gram``; under ``krylov`` it is an unbiased estimate,
    off by about half of itself over the square root of the number of directions that the dropped part is spread over.
    """

    b: Factor
    a: Factor
    lost: float


def truncate(
    terms: Sequence[tuple[Factor, Factor]], rank: int, *, how: How = "auto", split: Split = "balanced", start: Factor | None = None
) -> Truncated:
    """The product of ``rank`` nearest to M, the sum of ``terms`` (b (m, r_i), a (r_i, n), weights folded in), in Frobenius norm.

    ``split``: each singular value goes half to either side, or whole to the left, with orthonormal rows on the right.
    ``start`` (s, n): rows near the leading right singular vectors, such as the A that the sites started from; it saves ``krylov`` time.

    Raises:
        AdapterError: no terms, shapes that do not fit, a rank below 1, or values that are not finite.
    """
    if rank < 1:
        raise AdapterError(f"truncate: rank {rank} does not exist; it must be at least 1")
    whole = stack(terms)
    if not (np.isfinite(whole.b).all() and np.isfinite(whole.a).all()):
        raise AdapterError("truncate: the factors are not finite; drop the round and look for a diverging site")
    return _split(_leading(whole, rank, how, start), rank, split, np.result_type(whole.b, whole.a))


def _leading(whole: Product, rank: int, how: How, start: Factor | None) -> Leading:
    if how == "krylov" or (how == "auto" and len(whole.a) > BLOCKS * (rank + OVERSAMPLE)):
        found = by_krylov(whole, rank, start)
        return by_gram(whole, rank) if found is None else found
    return by_qr(whole, rank) if how == "qr" else by_gram(whole, rank)


def _split(found: Leading, rank: int, split: Split, dtype: np.dtype[np.floating[Any]]) -> Truncated:
    """Factors of M's projection on ``u``; the entry of largest size in each column of b is positive."""
    energies, turned = (x[..., ::-1] for x in np.linalg.eigh(found.image.T @ found.image))
    keep = energies > max(NEGLIGIBLE**2 * energies.max(initial=0.0), np.finfo(np.float64).tiny)
    values, left, right = np.sqrt(energies[keep]), found.u @ turned[:, keep], found.image @ turned[:, keep]
    count = len(values)
    signs = np.sign(left[np.abs(left).argmax(axis=0), range(count)])
    share = np.sqrt(values) if split == "balanced" else values
    b, a = np.zeros((len(left), rank), dtype), np.zeros((rank, len(right)), dtype)
    b[:, :count], a[:count] = left * (signs * share), (right * (signs / share)).T
    lost = 1.0 - float(energies[keep].sum()) / found.total if found.total else 0.0
    return Truncated(b, a, max(lost, 0.0))


def share_lost(truncated: Iterable[Truncated]) -> float:
    """The share of the energy that was dropped from several sums together."""
    found = [(norm((t.b, t.a)) ** 2, t.lost) for t in truncated]
    kept = sum(energy for energy, _ in found)
    dropped = sum(energy * share / (1.0 - share) for energy, share in found if share < 1.0)
    return dropped / (kept + dropped) if kept + dropped else 0.0
