"""Sums of task vectors at a chosen rank: SVD re-truncation, and task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedpeft.factors import Product, Truncated, scaled
from fedpeft.merging.base import cut
from fedpeft.merging.stacking import weighted
from fedpeft.tensors import Flat

Rank = Annotated[int, Field(ge=1)] | None


@dataclass(frozen=True)
class Svd:
    """The best product of ``rank`` for ``Σ w_i B_i A_i`` (none given: the largest rank merged); what it drops is reported."""

    kind: ClassVar[str] = "svd"

    rank: Rank = None

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """Truncated in its factors."""
        return cut([scaled(product, weight) for weight, product in terms], self.rank, terms)

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """The weighted sum: nothing to truncate."""
        return weighted(terms)


@dataclass(frozen=True)
class Arithmetic:
    """Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): ``scale Σ w_i τ_i``, for LoRA of the products B A, then as `Svd`."""

    kind: ClassVar[str] = "arithmetic"

    scale: float = 1.0
    rank: Rank = None

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """Truncated in its factors."""
        return Svd(self.rank).product([(self.scale * weight, product) for weight, product in terms], name)

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """The scaled sum."""
        return weighted([(self.scale * weight, x) for weight, x in terms])
