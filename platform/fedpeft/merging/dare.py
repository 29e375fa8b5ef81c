"""DARE (Yu et al. 2023, arXiv 2311.03099): drop entries of a task vector at random, scale up the rest, add."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.factors import Product, Truncated, scaled
from fedpeft.merging.arithmetic import Rank
from fedpeft.merging.base import cut
from fedpeft.merging.stacking import weighted
from fedpeft.tensors import Flat


@dataclass(frozen=True)
class Dare:
    """``Σ w_i mask_i τ_i / (1 - drop)``: its mean over masks is the plain sum. Masks come from ``seed``, the adapter's place and the name.

    For LoRA the entries of B are dropped and A stays, so that the mean over masks is Σ w_i B_i A_i as well (dropping in both
    factors would square the scale), and the result keeps its factors; then it is cut back to ``rank``.
    """

    kind: ClassVar[str] = "dare"

    drop: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0
    rank: Rank = None

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """Masks on B."""
        dropped = [Product(self._dropped(product.b, name, place), product.a) for place, (_, product) in enumerate(terms)]
        return cut([scaled(product, weight) for (weight, _), product in zip(terms, dropped, strict=True)], self.rank, terms)

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """Masks on the tensors of one role together."""
        return weighted([(weight, self._dropped(x, name, place)) for place, (weight, x) in enumerate(terms)])

    def _dropped(self, x: NDArray[Any], name: str, place: int) -> NDArray[Any]:
        key = hashlib.sha256(f"dare {self.seed} {place} {name}".encode()).digest()
        keep = np.random.default_rng(int.from_bytes(key)).random(x.shape) >= self.drop
        return np.asarray(np.where(keep, x / (1.0 - self.drop), 0.0).astype(x.dtype))
