"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): a small square matrix between two factors, the form that Fed-SB averages."""

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
class Core:
    """``y = W x + B R A x`` with B (out, r), R (r, r), A (r, in); which of the three move is the scheme's business.

    At start B is zero, R the identity and A random, so that it begins as LoRA does; the scheme `fedsb` turns the first rounds'
    update into orthonormal B and A and trains R alone from then on.
    """

    kind: ClassVar[str] = "core"

    r: Annotated[int, Field(ge=1)] = 32
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention",)

    @property
    def needs_weights(self) -> bool:
        """Fresh tensors only."""
        return False

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the target layers in place and return ``model``. Raises `AdapterError` when no layer matches."""
        from fedpeft.methods.attached import begin
        from fedpeft.methods.branches import add_branch, width_out
        from fedpeft.methods.targets import resolve

        names = resolve(model, self.targets)
        attached = begin(model, self.kind, head)
        for name in names:
            host = model.get_submodule(name)
            add_branch(host, name, (("lora_A", self.r), ("lora_R", self.r), ("lora_B", width_out(host))), attached)
        return model

    def entries(self, model: nn.Module) -> Entries:
        """Roles A, R, B and head."""
        from fedpeft.methods.attached import attached_to, head_entries

        own = attached_to(model).own
        found: Entries = {f"{values.PREFIX}{name}": (name.split(".")[-2][-1], parameter) for name, parameter in own.items()}
        return found | head_entries(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """A as LoRA's, B zero, R the identity, head fresh."""
        if entry.role == "A":
            return values.uniform_fan_in(entry, rng)
        if entry.role == "R":
            return np.eye(entry.shape[0], dtype=np.float32)
        return values.head(entry, rng, config) if entry.role == "head" else values.zeros(entry)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """A type that peft refuses, since it has no such method; `adapters convert` makes a LoRA of it."""
        return values.common(base_model, head, layout) | {
            "peft_type": "FEDPEFT_CORE",
            "r": self.r,
            "target_modules": values.modules_of(layout, ".lora_A.weight"),
            "modules_to_save": values.head_modules(layout),
        }

    def detach(self, model: nn.Module) -> None:
        """Take the matrices away."""
        from fedpeft.methods.attached import end

        end(model)
