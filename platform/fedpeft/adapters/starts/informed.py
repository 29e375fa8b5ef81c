"""Starts from rows that the coordinator may see: of activations (EVA), of weights under them (CorDA), of gradients (LoRA-GA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.adapters.starts import algebra
from fedpeft.adapters.starts.pairs import lora_of, modules, placed, put
from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from fedpeft.adapters.spec import Adapter, AdapterSpec
    from fedpeft.adapters.starts.algebra import Factors
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base


@dataclass(frozen=True)
class EVA:
    """A = the r principal directions of a layer's inputs, B = 0 (Paischer et al. 2024, arXiv 2410.07170), every layer of rank r.

    Singular vectors of the inputs as they are; peft's centres them. Ranks are not redistributed: a layout is fixed before data is seen.
    """

    kind: ClassVar[str] = "eva"
    needs_samples: ClassVar[bool] = True

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` without samples, or where the method is no plain LoRA."""
        from fedpeft.adapters.starts.watching import covariances

        rank = lora_of(self.kind, spec).r
        seen = covariances(base, spec, _given(self.kind, samples), seed)

        def factor(module: str, weight: NDArray[np.float32], rng: np.random.Generator) -> Factors:
            directions, _, _ = algebra.singular(seen[module], rank, rng)
            return np.zeros((len(weight), rank)), directions.T

        return placed(base, spec, seed, self.kind, factor)


@dataclass(frozen=True)
class CorDA:
    """B A = components of W C taken back by C^-1, C the covariance of a layer's inputs (Yang et al. 2024, arXiv 2406.05223).

    ``preview`` takes the largest (instruction-previewed), ``preserve`` the smallest, so that training keeps off what the samples use
    (knowledge-preserved). The held pair takes B A back.
    """

    kind: ClassVar[str] = "corda"
    needs_samples: ClassVar[bool] = True

    mode: Literal["preview", "preserve"] = "preview"

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` without samples, or as `pairs.put`."""
        from fedpeft.adapters.starts.watching import covariances

        rank = lora_of(self.kind, spec).r
        seen = covariances(base, spec, _given(self.kind, samples), seed)
        largest = self.mode == "preview"
        return put(base, spec, seed, self.kind, lambda module, w, _: algebra.weighted(w, seen[module], rank, largest))


@dataclass(frozen=True)
class LoraGA:
    """A = the first r right and B = the next r left singular vectors of the loss's gradient (Wang et al. 2024, arXiv 2407.05000).

    Both are scaled by out^(1/4) / sqrt(``gamma``), the paper's stable scale, and B by LoRA's folded scale. The held pair takes B A back.
    """

    kind: ClassVar[str] = "lora-ga"
    needs_samples: ClassVar[bool] = True

    gamma: Annotated[float, Field(gt=0)] = 16.0

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` without samples, as `pairs.put`, or where a layer is narrower than 2 r."""
        from fedpeft.adapters.starts.watching import gradients

        method = lora_of(self.kind, spec)
        seen = gradients(base, spec, _given(self.kind, samples), seed)
        narrow = [module for module in modules(spec) if min(seen[module].shape) < 2 * method.r]
        if narrow:
            raise AdapterError(f"start lora-ga: {narrow[0]} is narrower than 2 r = {2 * method.r}; lower method.r")

        def factor(module: str, weight: NDArray[np.float32], rng: np.random.Generator) -> Factors:
            u, _, v = algebra.singular(seen[module], 2 * method.r, rng)
            stable = len(u) ** 0.25 / self.gamma**0.5
            return u[:, method.r :] * stable * method.scale, v[: method.r] * stable

        return put(base, spec, seed, self.kind, factor)


def _given(kind: str, samples: Samples | None) -> Samples:
    if samples is None or not len(samples.data):
        raise AdapterError(
            f'start {kind}: needs rows that the coordinator may see; name a file of them (start = {{kind = "{kind}", data = ...}}), '
            "or use pissa or olora, which need none"
        )
    return samples
