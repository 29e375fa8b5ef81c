"""AdapterFusion: attention over experts that other tasks trained, which are frozen parts of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import AdapterError
from fedpeft.methods import values
from fedpeft.methods.own import shared
from fedpeft.tensors import Entry, Tensors

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec

Names = Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], ...], Field(min_length=2)]
Places = Annotated[tuple[Literal["attention", "mlp"], ...], Field(min_length=1)]


@dataclass(frozen=True)
class AdapterFusion:
    """``y + V sum_e s_e a_e(y)``, ``s = softmax over e of (Q y)'(K a_e)``, per token (Pfeiffer et al. 2021, arXiv 2005.00247).

    ``a_e`` is what expert e's bottleneck adds to y; ``experts`` names them and ``dim`` is their hidden size. Their tensors have the
    role ``expert``: part of the adapter, so that it is whole, and never trained or averaged. `fill` brings their values and the paper's
    start, V the identity; until then experts are random and V is zero.
    """

    kind: ClassVar[str] = "adapterfusion"
    needs_weights: ClassVar[bool] = False

    experts: Names = ("first", "second")
    dim: Annotated[int, Field(ge=1)] = 32
    places: Places = ("attention", "mlp")

    entries = shared.entries
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the layers in place and return ``model``. Raises `AdapterError` when the model has no such layers."""
        from fedpeft.methods.blends.experts import add_fusion

        add_fusion(model, head, self.experts, self.dim, self.places)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """V zero, Q and K small, experts random, head fresh: the base's answers, whatever the experts."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        if entry.role == "expert":
            return values.uniform_fan_in(entry, rng) if len(entry.shape) == 2 else values.zeros(entry)
        return values.zeros(entry) if entry.role == "value" else values.normal(entry, rng, 0.02)


def fill(fusion: Tensors, experts: Mapping[str, Tensors]) -> Tensors:
    """``fusion`` with the tensors of trained bottlenecks (``bottleneck``, ``houlsby``, ``pfeiffer``) as its experts, and V the identity.

    Raises:
        AdapterError: an expert of the fusion is not among ``experts``, or has other places or another ``dim``.
    """
    part = fusion.pick({"expert", "value"})
    named = {e.name: _expert(e.name, e.shape, experts) if e.role == "expert" else np.eye(e.shape[0]) for e in part.layout.entries}
    return fusion.patch(Tensors.from_named(part.layout, named))


def _expert(name: str, shape: tuple[int, ...], experts: Mapping[str, Tensors]) -> NDArray[np.float32]:
    """The tensor of a bottleneck that stands where ``<host>.adapterfusion.expert.<who>.<part>`` does."""
    host, _, rest = name.partition(".adapterfusion.expert.")
    who, _, part = rest.partition(".")
    if who not in experts:
        raise AdapterError(f"adapterfusion: no adapter was given for expert {who!r}; given are {sorted(experts)}")
    named = experts[who].named()
    found = next((named[key] for kind in ("bottleneck", "houlsby", "pfeiffer") if (key := f"{host}.{kind}.{part}") in named), None)
    if found is None or found.shape != shape:
        seen = "has no bottleneck there" if found is None else f"has shape {list(found.shape)}"
        raise AdapterError(
            f"adapterfusion: {name} needs shape {list(shape)}, expert {who!r} {seen}; set method.places and method.dim as its"
        )
    return found
