"""Leading singular vectors of M = B A from products with thin blocks alone (Musco and Musco 2015, arXiv 1504.05477).

The left basis grows by blocks: Q_1 spans M X for a random X, the next block spans M (M'Q_j), each made orthonormal to all before it. The
best rank-r approximation with columns in their span is read off M'Q, a small eigenproblem. Products with the factors are of
their own precision (float32), orthogonalisation and eigenproblems of float64.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from fedpeft.factors.leading import Leading
from fedpeft.factors.products import Factor, Matrix, Product

TOLERANCE = 6e-7
"""Error allowed above the optimum, as a share of ||M||; what is held against it is an estimate from above."""
OVERSAMPLE, PROBES, STEPS = 8, 8, 12
ROUNDING = 1e-6
"""A direction of a float32 block that is smaller than this share of M is noise of the products."""

FAINT = 1e-10
"""Share of the energy below which the optimal error is no larger than the rounding of float32 products."""


def by_krylov(whole: Product, rank: int, start: Factor | None = None) -> Leading | None:
    """The leading vectors, or None when the spectrum is so flat that `STEPS` blocks do not settle it.

    ``start`` (s, n): rows near the leading right singular vectors. The energy that the basis does not hold is estimated from
    `PROBES` random columns that took no part in building it.
    """
    first, probes = _starts(whole, rank, start)
    y = _forward(whole, np.concatenate([first, probes], axis=1))
    block, probed = y[:, : first.shape[1]], y[:, first.shape[1] :]
    basis, image = np.zeros((len(y), 0)), np.zeros((len(first), 0))
    captured, gains, size = 0.0, list[float](), float(np.linalg.norm(block))
    for _ in range(STEPS):
        fresh = _orthonormal(block, basis, size)
        z = _backward(whole, fresh)
        basis, image = np.concatenate([basis, fresh], axis=1), np.concatenate([image, z], axis=1)
        energies, turned = _ritz(image)
        total = float(energies.sum()) + _outside(probed, basis)
        before, captured = captured, float(energies[:rank].sum())
        gains += [captured - before] if before else []
        if not fresh.shape[1] or _settled(energies, rank, gains, total):
            turned = turned[:, :rank]
            found = Leading(basis @ turned, image @ turned, total)
            return found if total - captured > FAINT * total else _refined(whole, found, total - captured)
        block, size = _forward(whole, _orthonormal(z, image[:, :0], float(np.linalg.norm(z)))), sqrt(energies[0])
    return None


def _refined(whole: Product, found: Leading, dropped: float) -> Leading:
    """One more step from ``found``, with the factors in float64; the energy ``dropped`` stays."""
    whole = Product(whole.b.astype(np.float64), whole.a.astype(np.float64))
    u = _orthonormal(_forward(whole, found.image), found.u[:, :0], 0.0)
    image = _backward(whole, u)
    return Leading(u, image, float(np.vdot(image, image)) + dropped)


def _starts(whole: Product, rank: int, start: Factor | None) -> tuple[Matrix, Matrix]:
    """Columns (n, k) to start from and `PROBES` more; the same for every call of one shape."""
    draw = np.random.default_rng(0).standard_normal
    n, known = whole.a.shape[1], np.zeros((whole.a.shape[1], 0)) if start is None else np.asarray(start, np.float64).T
    width = min(max(rank - known.shape[1], 0) + OVERSAMPLE, n)
    return np.concatenate([known, draw((n, width))], axis=1), draw((n, PROBES))


def _forward(whole: Product, x: Matrix) -> Matrix:
    return np.asarray(whole.b @ (whole.a @ x.astype(whole.a.dtype)), np.float64)


def _backward(whole: Product, q: Matrix) -> Matrix:
    return np.asarray(whole.a.T @ (whole.b.T @ q.astype(whole.b.dtype)), np.float64)


def _orthonormal(block: Matrix, basis: Matrix, size: float) -> Matrix:
    """An orthonormal basis of what ``block`` adds to ``basis``, by eigenvectors of its Gram matrix, twice (Stathopoulos and Wu 2002)."""
    floor = (ROUNDING * size) ** 2
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
        values, vectors = np.linalg.eigh(block.T @ block)
        keep = values > floor
        block, floor = block @ (vectors[:, keep] / np.sqrt(values[keep])), 0.0
    return block


def _ritz(image: Matrix) -> tuple[Matrix, Matrix]:
    """Energies, largest first, and the turns of the basis that have them."""
    energies, turned = np.linalg.eigh(image.T @ image)
    return np.clip(energies[::-1], 0.0, None), turned[:, ::-1]


def _outside(probed: Matrix, basis: Matrix) -> float:
    rest = probed - basis @ (basis.T @ probed)
    return float(np.vdot(rest, rest) / probed.shape[1])


def _settled(energies: Matrix, rank: int, gains: list[float], total: float) -> bool:
    """Whether the energy still to be gained leaves the error within `TOLERANCE` of the optimum.

    Gains fall ever faster, so the rest is below a geometric series: of twice the last ratio, or, after the first gain, of the ratio
    (sigma_k / sigma_r)^4 of subspace iteration, k being the first value that was not asked for.
    """
    if not gains:
        return False
    tail = sqrt(max(total - float(energies[:rank].sum()), 0.0) / total)
    if len(gains) > 1:
        rate = 2.0 * gains[-1] / gains[-2] if gains[-2] > 0.0 else 0.0
    else:
        rate = float(energies[min(rank + OVERSAMPLE, len(energies)) - 1] / max(energies[min(rank, len(energies)) - 1], 1e-300)) ** 2
    rate = min(rate, 0.9)
    return gains[-1] * rate / (1 - rate) <= TOLERANCE * (2 * tail + TOLERANCE) * total
