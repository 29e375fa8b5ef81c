"""Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647): bottlenecks whose matrices are sums of Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.methods.own import shared
from fedpeft.tensors import Entry

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec


@dataclass(frozen=True)
class Compacter:
    """Houlsby's bottlenecks with ``W = sum_i A_i kron (t_i s_i^T)`` over ``terms`` n terms, for down and up alike.

    The A_i (n, n) are one set for the whole model (role ``slow``); s_i and t_i are each matrix's own (roles ``fast_down`` and
    ``fast_up``). n must divide ``dim`` and the widths. Up's t is 0 at start, so the model is the base's.
    """

    kind: ClassVar[str] = "compacter"
    needs_weights: ClassVar[bool] = False

    dim: Annotated[int, Field(ge=1)] = 32
    terms: Annotated[int, Field(ge=1)] = 4

    entries = shared.entries
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when ``terms`` does not divide the widths."""
        from fedpeft.methods.own.hooks import add_kronecker

        add_kronecker(model, head, self.dim, self.terms)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Such that down has the variance of a fan-in uniform; up's right factors and biases zero, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        if entry.role == "slow":
            return values.normal(entry, rng, 1.0 / sqrt(entry.shape[0]))
        if entry.name.endswith(".left"):
            return values.normal(entry, rng, 1.0 / sqrt(3 * entry.size))
        return values.normal(entry, rng, 1.0) if entry.name.endswith("fast_down.right") else values.zeros(entry)
