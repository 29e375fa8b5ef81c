"""A frozen for ever (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, factored, linear, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FFA:
    """A keeps its random start; B and all the rest move in every round, so B A averages exactly and DP noise stays linear.

    A layout without LoRA's factors is of the linear class and moves whole.
    """

    kind: ClassVar[str] = "ffa"
    sum_only: ClassVar[bool] = True

    def check(self, layout: Layout) -> None:
        """Any layout will do."""

    def roles(self, layout: Layout) -> frozenset[str]:
        """All but A."""
        return layout.roles - {"A"} if factored(layout) else layout.roles

    def exact(self, layout: Layout) -> bool:
        """True unless two multiplied roles still move together (DoRA's magnitude with B, a bottleneck's two halves)."""
        return linear(self.roles(layout))

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        check_round(round)
        return Phase("B" if factored(layout) else "all", self.roles(layout))

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of all but A: about half the bytes of `FedAvg`."""
        return difference(before, after, phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move all but A."""
        return move(current, mean, phase, optimizer, state)
