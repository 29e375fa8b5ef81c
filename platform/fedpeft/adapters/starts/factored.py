"""Starts from the weights alone: the principal part of each (PiSSA), or a part with an orthonormal factor (OLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedpeft.adapters.starts import algebra
from fedpeft.adapters.starts.pairs import lora_of, put

if TYPE_CHECKING:
    from fedpeft.adapters.spec import Adapter, AdapterSpec
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base


@dataclass(frozen=True)
class PiSSA:
    """B A = the best approximation of W of rank r, split evenly (Meng et al. 2024, arXiv 2404.02948); the held pair takes it back."""

    kind: ClassVar[str] = "pissa"
    needs_samples: ClassVar[bool] = False

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` as `pairs.put`."""
        rank = lora_of(self.kind, spec).r
        return put(base, spec, seed, self.kind, lambda _, weight, rng: algebra.balanced(weight, rank, rng))


@dataclass(frozen=True)
class OLora:
    """B A = r columns of Q times r rows of R, W = Q R (Buyukakyuz 2024, arXiv 2406.01775); the held pair takes it back."""

    kind: ClassVar[str] = "olora"
    needs_samples: ClassVar[bool] = False

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` as `pairs.put`."""
        rank = lora_of(self.kind, spec).r
        return put(base, spec, seed, self.kind, lambda _, weight, rng: algebra.orthonormal(weight, rank))
