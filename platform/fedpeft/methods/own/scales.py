"""One factor per output channel of frozen layers: SSF (arXiv 2210.08823) with shifts, PEQA (arXiv 2305.14152) without.

Both are linear in what they train, on any base: the layer's weight is ``diag(s) W`` and its bias ``s b + t``, so that the mean
of the tensors is the mean of the weights.
"""

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

Targets = Annotated[tuple[str, ...], Field(min_length=1)]


def initial(method: Ssf | Peqa, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
    """Scales 1, shifts 0, head fresh."""
    if entry.role == "head":
        return values.head(entry, rng, config)
    return np.full(entry.shape, 1.0 if entry.role == "scale" else 0.0, np.float32)


@dataclass(frozen=True)
class Ssf:
    """``scale * y + shift`` on what the target layers and all norms of the blocks put out (Lian et al. 2022)."""

    kind: ClassVar[str] = "ssf"
    needs_weights: ClassVar[bool] = False

    targets: Targets = ("all",)

    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when no layer matches."""
        from fedpeft.methods.own.hooks import add_scales

        add_scales(model, head, self.kind, self.targets, norms=True)
        return model


@dataclass(frozen=True)
class Peqa:
    """Train a frozen weight's scales alone: ``W = diag(s) W_q``, ``s`` one factor per output channel (Kim et al. 2023).

    The paper trains the quantizer's own scale table. Here the table stays frozen and ``s`` multiplies a whole row of it, which is
    the paper's per-channel form whatever the base's quantization (also none); its finer per-group tables are not trained.
    """

    kind: ClassVar[str] = "peqa"
    needs_weights: ClassVar[bool] = False

    targets: Targets = ("all",)

    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when no layer matches."""
        from fedpeft.methods.own.hooks import add_scales

        add_scales(model, head, self.kind, self.targets, norms=False)
        return model
