"""The mean of the sites' products, cut back to the adapter's rank (FlexLoRA, Bai et al. 2024, arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.factors import share_lost, truncate
from fedpeft.schemes import gathering
from fedpeft.schemes.base import Part, Phase, SiteContext, difference
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import matrices, require
from fedpeft.schemes.slots import Mask, Slots
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FlexLoRA:
    """B A moves to the best product of its rank for M = Σ p_i B_i A_i, singular values shared by both factors, largest first.

    The paper forms M and takes its SVD; here both are done in the factors. A site of smaller rank trains the first, largest
    slots and computes with all. Where M has less than full rank, the free rows of A keep their values, so that their slots can learn.
    """

    kind: ClassVar[str] = "flexlora"
    sum_only: ClassVar[bool] = False

    def check(self, layout: Layout) -> None:
        """Two factors that multiply as matrices."""
        require(self.kind, layout, gathering.FACTORS, 'set method.kind = "lora", or scheme.kind = "fedavg"')

    def roles(self, layout: Layout) -> frozenset[str]:
        """All but a second pair."""
        return layout.roles - gathering.FOLD

    def exact(self, layout: Layout) -> bool:
        """Only where the rank is that of the whole matrix; else up to what the truncation drops."""
        return gathering.never_truncated(layout, ("B", "A"))

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        return gathering.both(round, layout)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles."""
        return layout.subset(phase.roles)

    def mask(self, layout: Layout, phase: Phase, site: SiteContext) -> Mask | None:
        """The first slots, as many as the site can train; None for a site of full rank."""
        return Slots(pick="prefix").mask(layout, phase, site)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything; slots that the site did not train are zeros."""
        return difference(before, after, phase)

    def gather(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """Deltas to the truncated mean product; the plain mean for all other roles. Raises `UpdateError` when a part does not fit."""
        round, found = gathering.Round.of(current, parts, phase), []
        for pair in matrices(current.layout):
            a = round.start[pair.a]
            best = truncate(round.products(pair), len(a), start=a)
            free = ~best.b.any(axis=0)
            best.a[free] = a[free]
            round.put(pair, best[:2])
            found.append(best)
        return gathering.Gathered(round.out.layout, round.out.flat, share_lost(found))

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move the factors as gathered, all other roles by the optimizer's step."""
        return gathering.settle(current, mean, phase, optimizer, state)

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """``lost``: the share of the mean product's energy that the truncation dropped."""
        return gathering.lost(mean)
