"""Sparse deltas with personal masks: each site sends its largest changes, the coordinator moves the union of them (TAXONOMY: selective)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.modes import MODES, Factors
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Entry, Flat, Layout, Tensors

UNIT = 2.0**-4
"""What a kept coordinate counts in the sum of masses, see `slots`."""


@dataclass(frozen=True)
class Union:
    """A site keeps the ``share`` of each tensor's coordinates that changed most, heads whole, and sends zeros elsewhere.

    ``denominator`` "global" divides by all weights: the mean of what the sites sent, which shrinks coordinates that few kept. "local"
    divides every coordinate by the weight of those that kept it, and keeps its scale; the masses travel too, as many values again.
    Under a summed ring of integers a zero costs as much as a value: this is for what sparse changes do to one another (less
    interference), not for bytes. ``factors`` says which factors move, for LoRA.
    """

    kind: ClassVar[str] = "union"
    sum_only: ClassVar[bool] = True

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    denominator: Literal["global", "local"] = "local"
    factors: Factors = "both"

    def check(self, layout: Layout) -> None:
        """Any layout will do."""

    def roles(self, layout: Layout) -> frozenset[str]:
        """Those of the scheme that ``factors`` names."""
        return MODES[self.factors].roles(layout)

    def exact(self, layout: Layout) -> bool:
        """Only where nothing is left out and all weights divide."""
        return self.share == 1.0 and self.denominator == "global" and MODES[self.factors].exact(layout)

    def phase(self, round: int, layout: Layout) -> Phase:
        """That of the scheme that ``factors`` names."""
        return MODES[self.factors].phase(check_round(round), layout)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles, and one mass per coordinate where they are counted."""
        part = layout.subset(phase.roles)
        return Layout.of([*part.entries, *(_mass(entry) for entry in part.entries if self._counted(entry))])

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The largest changes, zeros elsewhere, and which they are."""
        delta = difference(before, after, phase)
        out = Tensors.zeros(self.travels(before.layout, phase))
        named = out.named()
        for entry, value in zip(delta.layout.entries, delta.named().values(), strict=True):
            kept = largest(value.ravel(), 1.0 if entry.role == "head" else self.share).reshape(entry.shape)
            named[entry.name][...] = np.where(kept, value, np.float32(0.0))
            if self._counted(entry):
                named[_mass(entry).name][...] = np.where(kept, np.float32(UNIT), np.float32(0.0))
        return out

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move the union of what the sites kept."""
        part, named = mean.pick(phase.roles), mean.named()
        for entry, value in zip(part.layout.entries, part.named().values(), strict=True):
            if self._counted(entry):
                mass = named[_mass(entry).name] / np.float32(UNIT)
                np.divide(value, mass, out=value, where=mass > 0.0)
        return move(current, part, phase, optimizer, state)

    def _counted(self, entry: Entry) -> bool:
        return self.denominator == "local" and entry.role != "head"


def largest(values: Flat, share: float) -> NDArray[np.bool_]:
    """True for the ``share`` (rounded up) of ``values`` largest in size, of equal ones the first; never for a zero."""
    count = ceil(share * values.size)
    kept = np.zeros(values.shape, np.bool_)
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    kept[order] = values[order] != 0.0
    return kept


def _mass(entry: Entry) -> Entry:
    return Entry("mass", f"mass/{entry.name}", entry.shape)
