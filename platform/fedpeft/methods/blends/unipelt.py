"""UniPELT: LoRA, a prefix and bottlenecks at once, each behind a gate (Mao et al. 2022, arXiv 2110.07577)."""

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
    from fedpeft.methods.protocol import Entries

MARK = ".unipelt_"


@dataclass(frozen=True)
class UniPelt:
    """``y + g(x) B A x`` on every layer of attention, ``context + g(x) softmax(q K) V`` in it, ``y + g(y) up(gelu(down(y)))`` after MLPs.

    Every part at every place has its own gate ``g(x) = sigmoid(w x + b)``, one number per token. The paper averages a gate over a row,
    which would see padding, other documents of a packed row and, in a causal model, the future. The prefix has a softmax of its own
    (the parallel form of He et al. 2021, arXiv 2110.04366, section 3.1), so that a closed gate means no prefix. ``tokens = 0``
    leaves the prefix out. The scale alpha/r is part of B.
    """

    kind: ClassVar[str] = "unipelt"
    needs_weights: ClassVar[bool] = False

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    tokens: Annotated[int, Field(ge=0)] = 10
    dim: Annotated[int, Field(ge=1)] = 48

    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``.

        Raises:
            AdapterError: the model has no attention or no MLP in its blocks, or its query is fused, so that no prefix reads it.
        """
        from fedpeft.methods.blends.gated import add_gated

        add_gated(model, head, self.r, self.tokens, self.dim)
        return model

    def entries(self, model: nn.Module) -> Entries:
        """Roles A, B, keys, values, down, up, gate and head."""
        from fedpeft.methods.attached import attached_to, head_entries

        own = attached_to(model).own
        found: Entries = {f"{values.PREFIX}{name}": (name.rpartition(MARK)[2].split(".")[1], p) for name, p in own.items()}
        return found | head_entries(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """A and ``down`` uniform over their fan-in, keys small, gates half open, all else zero, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        if entry.role == "keys":
            return values.normal(entry, rng, 0.02)
        drawn = entry.role in ("A", "down") and len(entry.shape) == 2
        return values.uniform_fan_in(entry, rng) if drawn else values.zeros(entry)

    def lr_scale(self, role: str) -> float:
        """The folded scale for B, 1 for all else."""
        return self.alpha / self.r if role == "B" else 1.0

    peft_config = shared.peft_config
