"""LoRA (Hu et al. 2021, arXiv 2106.09685), with rsLoRA (2312.03732) and DoRA (2402.09353) as switches.

The scale s = alpha/r (rsLoRA: alpha/sqrt(r)) is folded into B: our B is s times the paper's, in memory, on the wire and on
disk, and the exported config says ``lora_alpha = r``, so that peft's own scale is 1. Then averaging B averages the
weight change whatever each site's alpha, and merging, mixing and export never ask for a scale (ALGORITHMS.md, notation).

Training follows the user's alpha: an Adam step does not depend on the size of the gradient, so the paper's dynamics are
those of our B with s times the learning rate (`Lora.lr_scale`), decoupled weight decay staying at the unscaled rate. Two things
differ from the paper's run: Adam's epsilon, and the share that B has in a global gradient norm, both by a factor 1/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
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

ROLES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "M", ".lora_A2.weight": "A2", ".lora_B2.weight": "B2"}


@dataclass(frozen=True)
class Lora:
    """A trained product of rank ``r`` beside frozen linear layers: ``y = W x + B A x``, B of shape (out, r), A (r, in).

    ``targets`` are roles (attention, mlp, all), name suffixes (q_proj) or regular expressions; ``dropout`` is the share of
    the low-rank branch's inputs set to 0 in training. ``extra`` is the rank of a second product B2 A2 beside the first, zero at
    start: a scheme folds into it what averaging would lose, or keeps it private to each site. With ``held`` no round moves it (role
    ``held``): it takes back what a start such as PiSSA puts into the first, so that the base need not be rewritten.
    """

    kind: ClassVar[str] = "lora"

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention",)
    rslora: bool = False
    dora: bool = False
    extra: Annotated[int, Field(ge=0)] = 0
    held: bool = False

    @property
    def scale(self) -> float:
        """What the paper multiplies B A by; here it is part of B."""
        return self.alpha / (sqrt(self.r) if self.rslora else self.r)

    @property
    def needs_weights(self) -> bool:
        """DoRA's magnitudes start as the norms of the base's rows."""
        return self.dora

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Wrap the target layers in place and return ``model``. Raises `AdapterError` when no layer matches."""
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        from fedpeft.methods.attached import begin, inject
        from fedpeft.methods.branches import add_branch, width_out
        from fedpeft.methods.fused import fuse
        from fedpeft.methods.targets import families, resolve

        names = resolve(model, self.targets)
        groups = families(model, names)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r,
            lora_dropout=self.dropout,
            target_modules=names,
            use_dora=self.dora,
            fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        )
        attached = begin(model, self.kind, head)
        inject(model, config, attached)
        if not self.dora:
            for group in groups:
                fuse([model.get_submodule(name) for name in group], self.dropout)
        for name in names if self.extra else ():
            layer = model.get_submodule(name)
            add_branch(layer, name, (("lora_A2", self.extra), ("lora_B2", width_out(layer))), attached)
        return model

    def entries(self, model: nn.Module) -> Entries:
        """Roles A, B, M (DoRA), A2 and B2 (``extra``), or held for both, and head."""
        from fedpeft.methods.attached import attached_to, head_entries, injected

        own = {f"{values.PREFIX}{name}": parameter for name, parameter in attached_to(model).own.items()}
        found: Entries = {}
        for key, parameter in (injected(model) | own).items():
            name = key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
            role = next(role for tail, role in ROLES.items() if name.endswith(tail))
            found[name] = ("held" if self.held and role in ("A2", "B2") else role, parameter)
        return found | head_entries(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """A and A2 as peft draws A, B and B2 zero, as all that is held, head fresh; magnitudes come from the base."""
        if entry.role in ("A", "A2"):
            return values.uniform_fan_in(entry, rng)
        if entry.role in ("B", "B2", "held"):
            return values.zeros(entry)
        return values.head(entry, rng, config) if entry.role == "head" else None

    def lr_scale(self, role: str) -> float:
        """The folded scale for B and B2, 1 for all else."""
        return self.scale if role in ("B", "B2") else 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """LORA with ``lora_alpha = r`` and the full names of the target modules; with ``extra`` a type that peft refuses."""
        return values.common(base_model, head, layout) | {
            "peft_type": "FEDPEFT_LORA" if self.extra else "LORA",
            "r": self.r,
            "lora_alpha": self.r,
            "lora_dropout": self.dropout,
            "bias": "none",
            "target_modules": values.modules_of(layout, ".lora_A.weight"),
            "modules_to_save": values.head_modules(layout),
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": self.dora,
        }

    def detach(self, model: nn.Module) -> None:
        """Put the bare linear layers back."""
        from fedpeft.methods.attached import eject, end

        eject(model)
        end(model)
