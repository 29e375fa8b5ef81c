"""Exact merges by stacking: LoRA by rank, bottlenecks by hidden units, prompts and prefixes by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpeft.factors import Product, Truncated, scaled, stack
from fedpeft.tensors import Flat


@dataclass(frozen=True)
class Cat:
    """``Σ w_i B_i A_i`` as one product of rank Σ r_i, exactly; for other methods see `fedpeft.merging.hidden`.

    A method whose weights are linear in its tensors keeps its shape: ``Σ w_i`` of the task vectors, which is as exact.
    """

    kind: ClassVar[str] = "cat"

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """Factors side by side, the weight on B."""
        b, a = stack([scaled(product, weight) for weight, product in terms])
        return Truncated(b, a, 0.0)

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """The weighted sum."""
        return weighted(terms)


def weighted(terms: Sequence[tuple[float, Flat]]) -> Flat:
    """``Σ w_i x_i``, summed in float64."""
    return sum((weight * x.astype(np.float64) for weight, x in terms), np.zeros(1)).astype(np.float32)
