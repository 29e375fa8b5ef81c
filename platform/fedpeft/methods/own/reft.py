"""LoReFT (Wu et al. 2024, arXiv 2404.03592): the hidden states are edited inside a low-rank subspace after every block."""

from __future__ import annotations

from dataclasses import dataclass
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
class Reft:
    """``h + R^T (W h + b - R h)`` on what every block puts out, R (r, width) with orthonormal rows, at every token.

    R is the Q of a QR decomposition of the trained ``rotation``, so any mean of rotations gives an orthonormal R again. ``source``
    holds ``D = W - R`` and b, both 0 at start: the same functions as the paper's W, and the model begins as the base's. The paper
    edits chosen positions only; here all are, so that padding and a cache of keys and values change nothing.
    """

    kind: ClassVar[str] = "reft"
    needs_weights: ClassVar[bool] = False

    r: Annotated[int, Field(ge=1)] = 4

    entries = shared.entries
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the blocks in place and return ``model``. Raises `AdapterError` when ``r`` exceeds the hidden width."""
        from fedpeft.methods.own.hooks import add_subspaces

        add_subspaces(model, head, self.r)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Random rotations, sources zero, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        return values.normal(entry, rng, entry.shape[-1] ** -0.5) if entry.role == "rotation" else values.zeros(entry)
