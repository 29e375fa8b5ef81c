"""Alternating minimisation of LoRA's factors (RoLoRA, Chen et al. 2025, arXiv 2502.01755, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, factored, linear, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class Alternating:
    """Odd rounds move B and all that is not A, even rounds A and all that is not B: one factor stands still, so B A averages exactly.

    It starts with B because A has no gradient while B is zero. Heads, biases and scales move in every round. A layout
    without LoRA's factors is of the linear class: every round moves all of it, which is exact as well.
    """

    kind: ClassVar[str] = "alternating"
    sum_only: ClassVar[bool] = True

    def check(self, layout: Layout) -> None:
        """Any layout will do."""

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """True unless two multiplied roles still move together (DoRA's magnitude with a factor, a bottleneck's two halves)."""
        return all(linear(self.phase(round, layout).roles) for round in (1, 2))

    def phase(self, round: int, layout: Layout) -> Phase:
        """``B`` in odd rounds of the task, ``A`` in even ones, ``all`` where there are no factors."""
        check_round(round)
        if not factored(layout):
            return Phase("all", layout.roles)
        return Phase("B", layout.roles - {"A"}) if round % 2 else Phase("A", layout.roles - {"B"})

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of the roles that move: about half the bytes of `FedAvg`."""
        return difference(before, after, phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move the phase's roles; the other factor keeps its bits."""
        return move(current, mean, phase, optimizer, state)
