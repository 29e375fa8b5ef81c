"""Mixtures of LoRA experts with a router that is part of the adapter: HydraLoRA and a top-k mixture."""

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

Rank = Annotated[int, Field(ge=1)]
Many = Annotated[int, Field(ge=2)]
Alpha = Annotated[float, Field(gt=0)]
Targets = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True)
class HydraLora:
    """``y + sum_e w_e(x) B_e A x`` with one A for all experts, ``w = softmax(R x)`` per token (Tian et al. 2024, arXiv 2404.19245).

    The scale alpha/r is part of every B_e, as in `Lora`.
    """

    kind: ClassVar[str] = "hydralora"
    needs_weights: ClassVar[bool] = False

    r: Rank = 8
    alpha: Alpha = 16.0
    experts: Many = 4
    targets: Targets = ("attention",)

    entries = shared.entries
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the target layers in place and return ``model``. Raises `AdapterError` when no layer matches."""
        from fedpeft.methods.blends.experts import add_hydra

        add_hydra(model, head, self.targets, self.r, self.experts)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """A and router uniform over their fan-in, every B zero, head fresh."""
        return _initial(entry, rng, config)

    def lr_scale(self, role: str) -> float:
        """The folded scale for B, 1 for all else."""
        return self.alpha / self.r if role == "B" else 1.0


@dataclass(frozen=True)
class MoLora:
    """``y + sum_e w_e(x) B_e A_e x`` over the ``top`` experts of each token, their softmax renormalised (MixLoRA, arXiv 2404.15159).

    A soft mixture of all (MoLoRA, arXiv 2309.05444) has ``top = experts``. ``balance`` weighs the load-balancing loss of every layer, E
    times the sum over experts of their share of tokens times their mean probability (MixLoRA, eq. 6), per token as the task's own loss; it
    is 1 when tokens spread evenly. At 0 experts differ by their random A alone. The scale alpha/r is part of every B_e.
    """

    kind: ClassVar[str] = "molora"
    needs_weights: ClassVar[bool] = False

    r: Rank = 4
    alpha: Alpha = 8.0
    experts: Many = 4
    top: Annotated[int, Field(ge=1)] = 2
    targets: Targets = ("mlp",)
    balance: Annotated[float, Field(ge=0)] = 0.0

    entries = shared.entries
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the target layers in place and return ``model``. Raises `AdapterError` when no layer matches or ``top`` is too large."""
        from fedpeft.methods.blends.experts import add_mixture

        add_mixture(model, head, self.targets, self.r, (self.experts, self.top), self.balance)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """A and router uniform over their fan-in, every B zero, head fresh."""
        return _initial(entry, rng, config)

    def lr_scale(self, role: str) -> float:
        """The folded scale for B, 1 for all else."""
        return self.alpha / self.r if role == "B" else 1.0


def _initial(entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32]:
    """A router of zeros would never tell apart experts that all start at zero, hence its random start."""
    if entry.role == "head":
        return values.head(entry, rng, config)
    return values.zeros(entry) if entry.role == "B" else values.uniform_fan_in(entry, rng)
