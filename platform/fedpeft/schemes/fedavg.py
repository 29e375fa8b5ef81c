"""Federated averaging of every tensor (McMahan et al. 2017; FedIT, Zhang et al. 2023, arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedpeft.schemes import drift
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, linear, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FedAvg:
    """Every role moves in every round; with two free factors the product misses the cross term Σ p_i (B_i - B̄)(A_i - Ā).

    ``probes`` columns of at most 64 values per module travel beside the deltas and say how large that term is (`drift`); 0 sends none.
    """

    kind: ClassVar[str] = "fedavg"
    sum_only: ClassVar[bool] = True

    probes: Annotated[int, Field(ge=0)] = 4

    def check(self, layout: Layout) -> None:
        """Any layout will do."""

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """True only for methods without a product of trained factors (IA3, BitFit, prompts, prefixes, heads)."""
        return linear(layout.roles)

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        check_round(round)
        return Phase("all", layout.roles)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles and the probes."""
        return drift.travels(layout, phase, self.probes)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything, and the probes."""
        return drift.probed(before, difference(before, after, phase), phase, self.probes)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move everything by the optimizer's step."""
        return move(current, mean, phase, optimizer, state)

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """The share of the update that averaging loses."""
        return drift.rho(current, mean, phase, self.probes)
