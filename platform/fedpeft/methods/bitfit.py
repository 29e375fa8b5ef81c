"""BitFit: the base's own biases are trained, nothing is added (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.methods import values
from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries


@dataclass(frozen=True)
class BitFit:
    """All biases of the trunk, as float32 copies that start at the base's values. peft has no such method."""

    kind: ClassVar[str] = "bitfit"

    @property
    def needs_weights(self) -> bool:
        """Biases start at the base's values."""
        return True

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Swap the biases in place and return ``model``. Raises `AdapterError` when the trunk has none."""
        from fedpeft.methods.attached import begin
        from fedpeft.methods.grafts import swap_biases

        swap_biases(model, begin, head)
        return model

    def entries(self, model: nn.Module) -> Entries:
        """Roles bias and head."""
        from fedpeft.methods.attached import attached_to, head_entries

        own = attached_to(model).own
        return {f"{values.PREFIX}{name}": ("bias", parameter) for name, parameter in own.items()} | head_entries(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Biases come from the base, head fresh."""
        return values.head(entry, rng, config) if entry.role == "head" else None

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """A type that peft refuses, since it would ignore the biases: only fedpeft loads it."""
        return values.common(base_model, head, layout) | {"peft_type": "FEDPEFT_BITFIT", "modules_to_save": values.head_modules(layout)}

    def detach(self, model: nn.Module) -> None:
        """Put the base's own biases back."""
        from fedpeft.methods.attached import end

        end(model)
