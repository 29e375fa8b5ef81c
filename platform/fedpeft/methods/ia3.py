"""(IA)^3: learned gains on keys, values and the MLP's inner activations (Liu et al. 2022, arXiv 2205.05638)."""

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
class IA3:
    """One gain per output of each key and value projection and per input of each MLP's last layer, 1 at start.

    Averaging gains averages the effective weights exactly.
    """

    kind: ClassVar[str] = "ia3"

    @property
    def needs_weights(self) -> bool:
        """Gains start at 1, whatever the base."""
        return False

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Wrap the target layers in place and return ``model``. Raises `AdapterError` when the model has no such layers."""
        from peft import IA3Config
        from transformers.pytorch_utils import Conv1D

        from fedpeft.errors import AdapterError
        from fedpeft.methods.attached import begin, inject
        from fedpeft.methods.targets import keys_and_values, writers

        inner = writers(model, "mlp")
        names = keys_and_values(model) + inner
        if not names:
            raise AdapterError(f"ia3: {type(model).__name__} has no linear layers in numbered blocks; use bitfit, or a transformer base")
        turned = isinstance(model.get_submodule(names[0]), Conv1D)
        config = IA3Config(target_modules=names, feedforward_modules=inner, fan_in_fan_out=turned)
        inject(model, config, begin(model, self.kind, head))
        return model

    def entries(self, model: nn.Module) -> Entries:
        """Roles scale and head."""
        from fedpeft.methods.attached import head_entries, injected

        return {name: ("scale", parameter) for name, parameter in injected(model).items()} | head_entries(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Gains 1, head fresh."""
        return values.head(entry, rng, config) if entry.role == "head" else np.ones(entry.shape, np.float32)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """IA3 with the full names of the target modules; gains on inputs have the shape (1, in)."""
        inner = [entry.name for entry in layout.entries if entry.role == "scale" and entry.shape[0] == 1]
        return values.common(base_model, head, layout) | {
            "peft_type": "IA3",
            "target_modules": values.modules_of(layout, ".ia3_l"),
            "feedforward_modules": [name.removeprefix(values.PREFIX).removesuffix(".ia3_l") for name in inner],
            "modules_to_save": values.head_modules(layout),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    def detach(self, model: nn.Module) -> None:
        """Put the bare linear layers back."""
        from fedpeft.methods.attached import eject, end

        eject(model)
        end(model)
