"""Sparse deltas: a few entries of frozen weights are trained, at positions that all sites share, so averaging them is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.methods.own import shared
from fedpeft.tensors import Entry

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec

    Sparse: TypeAlias = "SparseMagnitude | SparseFisher | SparseLottery | SparseSeed"

Targets = Annotated[tuple[str, ...], Field(min_length=1)]
Density = Annotated[float, Field(gt=0, le=1)]


def attach(method: Sparse, model: nn.Module, head: HeadSpec) -> nn.Module:
    """Hook the layers in place and return ``model``. Raises `AdapterError` when no layer matches."""
    from fedpeft.methods.own.deltas import add_deltas

    add_deltas(model, head, method.kind, method.targets, method.density, getattr(method, "seed", None))
    return model


def initial(method: Sparse, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
    """Deltas zero, positions from the base, head fresh."""
    if entry.role == "head":
        return values.head(entry, rng, config)
    return values.zeros(entry) if entry.role == "delta" else None


@dataclass(frozen=True)
class SparseMagnitude:
    """Deltas at the largest ``density`` of each target weight.

    A site's quantized weight may rank its entries otherwise than the coordinator's, so the positions travel, in the first round
    only: role ``index``, which nobody trains.
    """

    kind: ClassVar[str] = "sparse-magnitude"
    needs_weights: ClassVar[bool] = True

    density: Density = 0.005
    targets: Targets = ("all",)

    attach = attach
    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach


@dataclass(frozen=True)
class SparseFisher:
    """Deltas at the ``density`` of each target weight whose squared gradients are largest (FISH mask, arXiv 2111.09839).

    The start ``fisher`` sets the positions, from rows that the coordinator may see; without it they are those of the largest weights.
    The paper ranks the entries of all weights together; here every weight has its own share, so that shapes do not depend on data.
    """

    kind: ClassVar[str] = "sparse-fisher"
    needs_weights: ClassVar[bool] = True

    density: Density = 0.005
    targets: Targets = ("all",)

    attach = attach
    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach


@dataclass(frozen=True)
class SparseLottery:
    """Deltas at the ``density`` of each target weight that a first training moves most (LT-SFT, arXiv 2110.07560).

    The start ``lottery`` sets the positions, from rows that the coordinator may see; without it they are those of the largest
    weights. Every weight has its own share, as in `SparseFisher`.
    """

    kind: ClassVar[str] = "sparse-lottery"
    needs_weights: ClassVar[bool] = True

    density: Density = 0.005
    targets: Targets = ("all",)

    attach = attach
    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach


@dataclass(frozen=True)
class SparseSeed:
    """Deltas at random positions of each target weight, which ``seed`` and the layer's name give: none travel."""

    kind: ClassVar[str] = "sparse-seed"
    needs_weights: ClassVar[bool] = False

    density: Density = 0.005
    targets: Targets = ("all",)
    seed: Annotated[int, Field(ge=0)] = 0

    attach = attach
    entries = shared.entries
    initial = initial
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach
