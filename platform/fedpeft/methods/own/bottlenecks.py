"""Bottleneck adapters by where they sit: Houlsby, Pfeiffer, parallel. All stack exactly: hidden units side by side, ``w_i * up``."""

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

Dim = Annotated[int, Field(ge=1)]


def initial(method: Houlsby | Pfeiffer | Parallel, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
    """``down`` uniform over its fan-in, ``up`` and biases zero, head fresh."""
    if entry.role == "head":
        return values.head(entry, rng, config)
    return values.uniform_fan_in(entry, rng) if entry.role == "down" and len(entry.shape) == 2 else values.zeros(entry)


@dataclass(frozen=True)
class Houlsby:
    """``y + up(gelu(down(y)))`` on what each attention and each MLP writes, before the residual (arXiv 1902.00751).

    ``dim`` hidden units. ``up`` is 0 at start, so the model is the base's.
    """

    kind: ClassVar[str] = "houlsby"
    needs_weights: ClassVar[bool] = False

    dim: Dim = 32

    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when the model has no such layers."""
        from fedpeft.methods.attached import begin
        from fedpeft.methods.grafts import add_bottlenecks

        add_bottlenecks(model, begin, head, self.dim, self.kind, ("attention", "mlp"))
        return model


@dataclass(frozen=True)
class Pfeiffer:
    """``y + up(gelu(down(y)))`` on what each MLP writes, before the residual (arXiv 2005.00247): half of Houlsby's tensors."""

    kind: ClassVar[str] = "pfeiffer"
    needs_weights: ClassVar[bool] = False

    dim: Dim = 48

    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when the model has no such layers."""
        from fedpeft.methods.attached import begin
        from fedpeft.methods.grafts import add_bottlenecks

        add_bottlenecks(model, begin, head, self.dim, self.kind, ("mlp",))
        return model


@dataclass(frozen=True)
class Parallel:
    """``mlp(x) + up(gelu(down(x)))`` beside each MLP, ``x`` its input (He et al. 2021, arXiv 2110.04366).

    The paper's ``scale`` s = 4 is part of ``up``, as LoRA's is part of B: ours is s times the paper's, with s times its learning rate.
    """

    kind: ClassVar[str] = "parallel"
    needs_weights: ClassVar[bool] = False

    dim: Dim = 32
    scale: Annotated[float, Field(gt=0)] = 4.0

    entries = shared.entries
    initial = initial
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when the model has no MLP in its blocks."""
        from fedpeft.methods.own.hooks import add_parallel

        add_parallel(model, head, self.dim)
        return model

    def lr_scale(self, role: str) -> float:
        """The folded scale for ``up``, 1 for all else."""
        return self.scale if role == "up" else 1.0
