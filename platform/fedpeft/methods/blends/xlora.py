"""X-LoRA: frozen LoRA experts of other tasks under one router that reads the base's last hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import AdapterError
from fedpeft.methods import values
from fedpeft.methods.blends.fusion import Names
from fedpeft.methods.own import shared
from fedpeft.tensors import Entry, Tensors

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec

PARTS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


@dataclass(frozen=True)
class XLora:
    """``y + sum_e s_le(t) B_e A_e x`` at layer l, ``s = softmax over e of W h + b`` per token (Buehler & Buehler 2024, arXiv 2402.07148).

    h is the token's last hidden state in a first pass without experts, so a forward costs two; the router W of all layers is all that
    trains. ``experts`` names adapters of rank ``r`` or less, whose tensors (role ``expert``) `fill` brings: they are part of the
    adapter, as the router is, so it is whole wherever it is loaded. Until then they are random, and the start is their mean.
    """

    kind: ClassVar[str] = "xlora"
    needs_weights: ClassVar[bool] = False

    experts: Names = ("first", "second")
    r: Annotated[int, Field(ge=1)] = 8
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention",)

    entries = shared.entries
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the target layers and the trunk in place and return ``model``. Raises `AdapterError` when no layer matches."""
        from fedpeft.methods.blends.scaling import add_scaled

        add_scaled(model, head, self.targets, self.experts, self.r)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Router zero, so every expert weighs the same; experts random, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        return values.uniform_fan_in(entry, rng) if entry.role == "expert" else values.zeros(entry)


def fill(mixture: Tensors, experts: Mapping[str, Tensors]) -> Tensors:
    """``mixture`` with the tensors of trained LoRA adapters as its experts; a smaller rank is filled up with zeros.

    Raises:
        AdapterError: an expert of the mixture is not among ``experts``, lacks a layer, or has a larger rank.
    """
    part = mixture.pick({"expert"})
    return mixture.patch(Tensors.from_named(part.layout, {e.name: _expert(e, experts) for e in part.layout.entries}))


def _expert(entry: Entry, experts: Mapping[str, Tensors]) -> NDArray[np.float32]:
    host, _, rest = entry.name.partition(".xlora.expert.")
    who, _, factor = rest.rpartition(".")
    if who not in experts:
        raise AdapterError(f"xlora: no adapter was given for expert {who!r}; given are {sorted(experts)}")
    found = experts[who].named().get(f"{host}{PARTS[factor]}")
    more = [] if found is None else [want - have for want, have in zip(entry.shape, found.shape, strict=True)]
    if found is None or min(more) < 0:
        seen = "is not adapted there" if found is None else f"has shape {list(found.shape)} there"
        raise AdapterError(
            f"xlora: {entry.name} needs shape {list(entry.shape)}, expert {who!r} {seen}; set method.targets and method.r as its"
        )
    return np.pad(found, [(0, extra) for extra in more])
