"""Experts that other adapters trained, for methods that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedpeft.adapters.folder import load
from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.errors import AdapterError
from fedpeft.methods.blends import fusion, prompts, xlora
from fedpeft.tensors import Tensors

if TYPE_CHECKING:
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base

FILL: dict[str, Callable[[Tensors, Mapping[str, Tensors]], Tensors]] = {
    "adapterfusion": fusion.fill,
    "attempt": prompts.fill,
    "xlora": xlora.fill,
}


@dataclass(frozen=True)
class Experts:
    """Fill an ``adapterfusion`` with bottlenecks, an ``attempt`` with prompts or an ``xlora`` with LoRA.

    ``adapters`` maps the experts' names to adapter folders.
    """

    adapters: Annotated[Mapping[str, str], Field(min_length=1)]

    kind: ClassVar[str] = "experts"
    needs_samples: ClassVar[bool] = False

    def rooted(self, folder: Path) -> Experts:
        """See `Files.rooted`."""
        return Experts({name: str(folder / Path(path).expanduser()) for name, path in self.adapters.items()})

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0.

        Raises:
            AdapterError: the method has no experts, an adapter is of another base, or its tensors do not fit.
        """
        from fedpeft.adapters.making import initial

        if spec.method.kind not in FILL:
            raise AdapterError(f"start experts: method {spec.method.kind} has none; it is for {sorted(FILL)}")
        found = {name: _read(Path(folder), spec) for name, folder in self.adapters.items()}
        return Adapter(spec, FILL[spec.method.kind](initial(base, spec, seed).tensors, found))


def _read(folder: Path, spec: AdapterSpec) -> Tensors:
    adapter = load(folder)
    if adapter.spec.base != spec.base:
        raise AdapterError(
            f"start experts: {folder} was made for base {adapter.spec.base[:12]}, not {spec.base[:12]}; give adapters of this base"
        )
    return adapter.tensors
