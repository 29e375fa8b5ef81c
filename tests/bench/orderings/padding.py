"""Conventions for sites of different ranks: what becomes of a slot (a row of A with its column of B) that some sites lack.

The first three send values, and a site's model has only its own first slots: ``zero`` averages with zeros in the missing slots
(HetLoRA-like, Cho et al. 2024, arXiv 2401.06432), so that a slot's product shrinks by its mass squared; ``slot`` divides both
factors by the mass (RBLA, arXiv 2408.08699); ``mass`` divides one, which leaves the mean of the sites' products. The platform's own
scheme for this, `fedpeft.schemes.Slots`, averages deltas instead, with all slots in every site's forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tests.bench.orderings.simulate import Mask, Place

from fedpeft.adapters.live import Live
from fedpeft.schemes import Phase, Scheme
from fedpeft.tensors import Layout, Tensors

Slots = NDArray[np.float32]
AXIS = {"A": 0, "B": 1}


@dataclass(frozen=True)
class Padded:
    """Values of the sites' first slots, averaged; ``shares`` are the sites' weights, which sum to 1; ``by`` says what moves when."""

    kind: Literal["zero", "slot", "mass"]
    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    by: Scheme | None = None

    def phase(self, round: int, layout: Layout) -> Phase:
        """All roles in every round, or those of ``by``."""
        return Phase("all", layout.roles) if self.by is None else self.by.phase(round, layout)

    def begin(self, live: Live, current: Tensors, place: Place) -> Tensors:
        """The site's own slots. The others are zero in both factors, hence without gradient, hence zero afterwards."""
        rank = max(self.ranks)
        return scaled(current, {role: (np.arange(rank) < self.ranks[place.site]).astype(np.float32) for role in AXIS})

    def mask(self, layout: Layout, phase: Phase, place: Place) -> Mask | None:
        """Everywhere."""

    def finish(self, before: Tensors, after: Tensors, phase: Phase, place: Place) -> Tensors:
        """The values."""
        return after.pick(phase.roles)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase) -> Tensors:
        """The mean, corrected as the convention says."""
        inverse = (1.0 / self.mass).astype(np.float32)
        return current.patch(scaled(mean, {"zero": {}, "slot": {"A": inverse, "B": inverse}, "mass": {"B": inverse}}[self.kind]))

    def show(self, live: Live, current: Tensors) -> Tensors:
        """All slots."""
        return current

    @property
    def mass(self) -> NDArray[np.float64]:
        """Weight of the sites that have each slot (r,)."""
        has = np.arange(max(self.ranks)) < np.array(self.ranks)[:, None]
        return np.asarray(self.shares) @ has


def scaled(adapter: Tensors, factors: dict[str, Slots]) -> Tensors:
    """Each slot of the roles in ``factors`` times its factor (r,)."""
    out = Tensors(adapter.layout, adapter.flat.copy())
    views = out.named()
    for entry in adapter.layout.entries:
        if entry.role in factors:
            views[entry.name][...] *= np.expand_dims(factors[entry.role], 1 - AXIS[entry.role])
    return out
