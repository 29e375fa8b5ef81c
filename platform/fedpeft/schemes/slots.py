"""Heterogeneous ranks: a site trains as many slots as it can afford, and deltas are averaged (ours; cf. Fed-PLoRA, arXiv 2602.16936)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.schemes import drift
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.modes import MODES, Factors
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import require
from fedpeft.tensors import Entry, Layout, Tensors

Mask = NDArray[np.bool_]
UNIT = 2.0**-4
"""What a trained slot counts in the sum of masses: small, to pass any grid's reach, and exact on the grid of a usual round."""


@dataclass(frozen=True)
class Slots:
    """Slot j is column j of every B with row j of every A. Sites compute with all slots and train ``SiteContext.rank`` of them.

    ``pick``: which ones, "random" by round and site (every slot gets trained) or the "prefix". ``average``: with "delta" a slot moves by
    Σ p_i dB_ij over all sites, those that left it alone counting as no change, so the product moves by the mean of the sites'
    products; with "mass" that is divided by the slot's mass Σ p_i [i trained j]: the mean over those that trained it. Values
    are never padded with zeros: that would weigh slot j of the product by mass². ``factors`` says which factors move; with
    "both", ``probes`` columns per module measure what averaging loses (`drift`).

    The masses travel in the same sum, r values per distinct rank. A slot nobody trained keeps its bits.
    """

    kind: ClassVar[str] = "slots"
    sum_only: ClassVar[bool] = True

    pick: Literal["random", "prefix"] = "random"
    average: Literal["delta", "mass"] = "delta"
    factors: Factors = "alternating"
    probes: Annotated[int, Field(ge=0)] = 4

    def check(self, layout: Layout) -> None:
        """Two factors that multiply as matrices."""
        require(self.kind, layout, frozenset("AB"), 'set method.kind = "lora", or scheme.kind = "fedavg"')

    def roles(self, layout: Layout) -> frozenset[str]:
        """Those of the scheme that ``factors`` names."""
        return MODES[self.factors].roles(layout)

    def exact(self, layout: Layout) -> bool:
        """With "delta" as the scheme that ``factors`` names; with "mass" the product moves by more than the mean."""
        return self.average == "delta" and MODES[self.factors].exact(layout)

    def phase(self, round: int, layout: Layout) -> Phase:
        """That of the scheme that ``factors`` names."""
        return MODES[self.factors].phase(check_round(round), layout)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles, the masses, and probes where both factors move by their deltas."""
        masses = [Entry("mass", f"mass/{rank}", (rank,)) for rank in sorted(_ranks(layout))]
        return Layout.of([*drift.travels(layout, phase, self._probes).entries, *masses])

    def mask(self, layout: Layout, phase: Phase, site: SiteContext) -> Mask | None:
        """The site's slots of the factors that train, and all of every other role; None for a site of full rank."""
        if site.rank is None or site.rank >= max(_ranks(layout)):
            return None
        chosen = {rank: self.chosen(rank, site) for rank in _ranks(layout)}
        return np.concatenate([_spread(entry, chosen).ravel() for entry in layout.subset(phase.trains).entries])

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of the site's slots, zero in all others, with their masses."""
        delta = difference(before, after, phase)
        chosen = {rank: self.chosen(rank, site) for rank in _ranks(before.layout)}
        for entry, value in zip(delta.layout.entries, delta.named().values(), strict=True):
            value[~_spread(entry, chosen)] = 0.0
        out = Tensors.zeros(self.travels(before.layout, phase)).patch(drift.probed(before, delta, phase, self._probes))
        for rank, slots in chosen.items():
            out.named()[f"mass/{rank}"][slots] = UNIT
        return out

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move the slots that somebody trained, and all other roles."""
        masses = {rank: mean.named()[f"mass/{rank}"] / np.float32(UNIT) for rank in _ranks(current.layout)}
        part = mean.pick(phase.roles)
        if self.average == "mass":
            part = _divided(part, masses)
        moved, state = move(current, part, phase, optimizer, state)
        idle = {rank: mass <= 0.0 for rank, mass in masses.items()}
        for entry in moved.layout.subset(phase.roles & {"A", "B"}).entries:
            where = _spread(entry, idle)
            moved.named()[entry.name][where] = current.named()[entry.name][where]
        return moved, state

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """The share of the update that averaging loses; empty where it loses none."""
        return drift.rho(current, mean, phase, self._probes)

    @property
    def _probes(self) -> int:
        return self.probes if self.average == "delta" else 0

    def chosen(self, rank: int, site: SiteContext) -> NDArray[np.bool_]:
        """Which of ``rank`` slots the site trains; modules of one rank share the choice."""
        wanted = rank if site.rank is None else min(site.rank, rank)
        order = np.arange(rank)
        if self.pick == "random":
            seed = hashlib.sha256(f"{site.seed}\0{site.name}\0{rank}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(seed)).permutation(rank)
        return np.isin(np.arange(rank), order[:wanted])


def _ranks(layout: Layout) -> set[int]:
    return {entry.shape[0] for entry in layout.entries if entry.role == "A"}


def _spread(entry: Entry, by_rank: dict[int, Mask]) -> Mask:
    """Values by slot over the shape of ``entry``: by column for B, by row for A; True everywhere for other roles."""
    if entry.role == "B":
        return np.broadcast_to(by_rank[entry.shape[1]], entry.shape)
    if entry.role == "A":
        return np.broadcast_to(by_rank[entry.shape[0]][:, None], entry.shape)
    return np.broadcast_to(np.True_, entry.shape)


def _divided(part: Tensors, masses: dict[int, NDArray[np.float32]]) -> Tensors:
    """Slots over their masses; those without mass stay."""
    out = Tensors(part.layout, part.flat.copy())
    by_rank = {rank: np.where(mass > 0.0, mass, np.float32(1.0)) for rank, mass in masses.items()}
    for entry, value in zip(out.layout.entries, out.named().values(), strict=True):
        if entry.role in ("A", "B"):
            mass = by_rank[entry.shape[1] if entry.role == "B" else entry.shape[0]]
            value /= mass if entry.role == "B" else mass[:, None]
    return out
