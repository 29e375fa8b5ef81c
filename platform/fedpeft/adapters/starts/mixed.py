"""A new task's start from adapters of other tasks: their weighted mixture, cut to the rank of the new adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedpeft.adapters.folder import load
from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.adapters.starts.pairs import lora_of
from fedpeft.errors import AdapterError
from fedpeft.factors import Pair, Product, products, scaled, truncate
from fedpeft.tensors import Tensors

if TYPE_CHECKING:
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base


@dataclass(frozen=True)
class Mixture:
    """B A = the best product of rank r for ``sum_i w_i B_i A_i`` over ``adapters`` (folder -> weight); the head starts fresh.

    Weights are those of a route (`fedpeft client start`), taken as they are. Ranks may differ, targets may not. What a second pair of an
    adapter adds is part of its product.
    """

    adapters: Annotated[Mapping[str, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]

    kind: ClassVar[str] = "mixture"
    needs_samples: ClassVar[bool] = False

    def rooted(self, folder: Path) -> Mixture:
        """See `Files.rooted`."""
        return Mixture({str(folder / Path(name).expanduser()): weight for name, weight in self.adapters.items()})

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0.

        Raises:
            AdapterError: the method is no plain LoRA, an adapter is of another base, another method or other targets.
        """
        from fedpeft.adapters.making import initial

        rank = lora_of(self.kind, spec).r
        start = initial(base, spec, seed).tensors
        named = start.named()
        terms = [(weight, _read(Path(folder), spec)) for folder, weight in self.adapters.items()]
        for pair in products(start):
            made = truncate([scaled(found[pair], weight) for weight, parts in terms for found in parts if pair in found], rank)
            named[pair.b][...], named[pair.a][...] = made.b, made.a
        return Adapter(spec, Tensors.from_named(spec.layout, named))


def _read(folder: Path, spec: AdapterSpec) -> list[dict[Pair, Product]]:
    """The adapter's products, by pair of the first: its own and, where it has one, its second pair."""
    adapter = load(folder)
    if adapter.spec.base != spec.base:
        raise AdapterError(
            f"start mixture: {folder} was made for base {adapter.spec.base[:12]}, not {spec.base[:12]}; give adapters of this base"
        )
    lora_of("mixture", adapter.spec)
    first = products(adapter.tensors)
    if list(first) != list(products(Tensors.zeros(spec.layout))):
        raise AdapterError(f"start mixture: {folder} acts on other modules than {spec.task}; set method.targets as it was trained with")
    second = products(adapter.tensors, ("B2", "A2")).values()
    return [first, *([dict(zip(first, second, strict=True))] if second else [])]
