"""Averaged factors, and what averaging them loses folded beside them (FedEx-LoRA, Singhal et al. 2024, arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.factors import share_lost, truncate
from fedpeft.schemes import gathering
from fedpeft.schemes.base import Part, Phase, SiteContext, difference
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import require
from fedpeft.schemes.slots import Mask, Slots
from fedpeft.tensors import Layout, Tensors

FIX = 'set method.kind = "lora" and method.extra to the rank of the fold, such as 4 times method.r, or scheme.kind = "flexlora"'


@dataclass(frozen=True)
class FedEx:
    """A and B move to their means, and the residual Σ p_i (B_i - B̄)(A_i - Ā) is added to the fold B2 A2, so the whole moves by the mean.

    The paper adds the residual, of rank up to (K-1) r per round, to the base's weights; a quantized base cannot take it, and a
    frozen one must not, so it goes to a pair of rank ``method.extra``, which is truncated to its best approximation once it is full.
    A site of smaller rank trains a random subset of the slots and computes with all.
    """

    kind: ClassVar[str] = "fedex"
    sum_only: ClassVar[bool] = False

    def check(self, layout: Layout) -> None:
        """A fold beside the factors."""
        require(self.kind, layout, gathering.FACTORS | gathering.FOLD, FIX)

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """Only where the fold has the rank of the whole matrix; else until it is full, and then up to what the truncation drops."""
        return gathering.never_truncated(layout, gathering.SECOND)

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round: the sites never train the fold."""
        return gathering.both(round, layout, settles=gathering.FOLD)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles; the fold only goes down."""
        return layout.subset(phase.roles)

    def mask(self, layout: Layout, phase: Phase, site: SiteContext) -> Mask | None:
        """A random subset of slots, as many as the site can train; None for a site of full rank."""
        return Slots(pick="random").mask(layout, phase, site)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything; slots that the site did not train are zeros."""
        return difference(before, after, phase)

    def gather(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The mean delta, and the delta of the fold that takes the residual in. Raises `UpdateError` when a part does not fit."""
        round, found = gathering.Round.of(current, parts, phase), []
        for pair, second in gathering.folds(current.layout):
            fold = round.fold(second)
            best = truncate([fold, *round.crosses(pair)], len(fold.a), start=fold.a)
            round.put(second, best[:2])
            found.append(best)
        return gathering.Gathered(round.out.layout, round.out.flat, share_lost(found))

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move factors and fold as gathered, all other roles by the optimizer's step."""
        return gathering.settle(current, mean, phase, optimizer, state)

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """``lost``: the share of the fold's energy that the truncation dropped."""
        return gathering.lost(mean)
