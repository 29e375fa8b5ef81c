"""Serial bottleneck adapters after attention and MLP (Houlsby et al. 2019, arXiv 1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries


@dataclass(frozen=True)
class Bottleneck:
    """``y + up(gelu(down(y)))`` on what each attention and each MLP writes back, before the residual; ``dim`` hidden units.

    ``up`` is 0 at start, so the model is the base's. Hooks see only the layers' outputs: any quantized base will do.
    """

    kind: ClassVar[str] = "bottleneck"

    dim: Annotated[int, Field(ge=1)] = 32

    @property
    def needs_weights(self) -> bool:
        """Fresh tensors only."""
        return False

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when the model has no such layers."""
        from fedpeft.methods.attached import begin
        from fedpeft.methods.grafts import add_bottlenecks

        add_bottlenecks(model, begin, head, self.dim)
        return model

    def entries(self, model: nn.Module) -> Entries:
        """Roles down, up (weights and biases) and head."""
        from fedpeft.methods.attached import attached_to, head_entries

        own = attached_to(model).own
        found: Entries = {f"{values.PREFIX}{name}": (name.split(".")[-2], parameter) for name, parameter in own.items()}
        return found | head_entries(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """``down`` uniform over its fan-in, ``up`` and biases zero, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        return values.uniform_fan_in(entry, rng) if entry.role == "down" and len(entry.shape) == 2 else values.zeros(entry)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """A type that peft refuses, since it has no such method: only fedpeft loads it."""
        return values.common(base_model, head, layout) | {
            "peft_type": "FEDPEFT_BOTTLENECK",
            "dim": self.dim,
            "target_modules": values.modules_of(layout, ".bottleneck.down.weight"),
            "modules_to_save": values.head_modules(layout),
        }

    def detach(self, model: nn.Module) -> None:
        """Take the hooks and modules away."""
        from fedpeft.methods.attached import end

        end(model)
