"""KnOTS (Stoica et al. 2024, arXiv 2410.19735): TIES after the weight changes of all tasks are put into one orthogonal basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpeft.errors import AdapterError
from fedpeft.factors import Product, Truncated, stack
from fedpeft.merging.arithmetic import Rank
from fedpeft.merging.base import cut
from fedpeft.merging.ties import Density, Values, ties, trim
from fedpeft.tensors import Flat

NEGLIGIBLE = 1e-6
"""Directions below this share of the largest singular value are rounding of float32 factors."""


@dataclass(frozen=True)
class Knots:
    """``[ΔW_1 ... ΔW_T] = U Σ [V_1' ... V_T']``; the V_t' are merged by TIES, and ``U Σ V'`` is the result, cut back to ``rank``.

    All in the factors: the columns of all B span U, so what is decomposed has Σ r_i rows. With ``rank`` at least Σ r_i nothing is cut.
    """

    kind: ClassVar[str] = "knots"

    density: Density = 0.2
    scale: float = 1.0
    rank: Rank = None

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """The rule on (R, n) matrices in place of (m, n)."""
        basis, parts = aligned([product for _, product in terms])
        merged = ties((weight, trim(part, self.density)) for (weight, _), part in zip(terms, parts, strict=True))
        return cut([Product((self.scale * basis).astype(np.float32), merged.astype(np.float32))], self.rank, terms)

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """Not defined."""
        raise AdapterError("merge knots: needs LoRA's products, whose factors it aligns; for this method use ties")


def aligned(products: Sequence[Product]) -> tuple[Values, list[Values]]:
    """U Σ (m, R) and the V_t' (R, n) with ``U Σ V_t' = B_t A_t``, R at most the sum of the ranks. All zero products give R = 1."""
    q, r = np.linalg.qr(stack(products).b.astype(np.float64))
    ends = np.cumsum([0, *(len(product.a) for product in products)])
    cores = [r[:, s:e] @ p.a for s, e, p in zip(ends, ends[1:], products, strict=False)]
    energies, u = np.linalg.eigh(sum(core @ core.T for core in cores))
    keep = energies > max(NEGLIGIBLE**2 * energies[-1], np.finfo(np.float64).tiny)
    keep[-1] = True
    sizes = np.sqrt(np.maximum(energies[keep], np.finfo(np.float64).tiny))[::-1]
    u = u[:, keep][:, ::-1]
    return (q @ u) * sizes, [(u / sizes).T @ core for core in cores]
