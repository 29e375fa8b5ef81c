"""A private pair beside the shared one (FedDPA, Yang et al. 2024, arXiv 2403.19211)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.modes import MODES, Factors
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import require_roles
from fedpeft.tensors import Layout, Tensors

PRIVATE = frozenset({"A2", "B2"})


@dataclass(frozen=True)
class FedDPA:
    """``y = W x + B A x + B2 A2 x``: every site trains both pairs together and keeps B2, A2; the rest moves as ``factors`` says.

    Both have weight 1 in training and in its evaluations. A site that serves weighs its pair text by text (`routing.nearness`), adding
    ``lambda_x B2 A2 x`` where the paper, whose pairs are trained apart, takes ``(1 - lambda_x)`` of the shared one as well.
    The private pair starts at zero, so a site that never trained answers with the shared one.
    """

    kind: ClassVar[str] = "feddpa"
    sum_only: ClassVar[bool] = True

    factors: Factors = "alternating"

    def check(self, layout: Layout) -> None:
        """The method needs its second pair."""
        require_roles(self.kind, layout, PRIVATE | {"A", "B"}, 'set method.kind = "lora" and method.extra to the private rank, such as 8')

    def roles(self, layout: Layout) -> frozenset[str]:
        """All but the private pair."""
        return MODES[self.factors].roles(_shared(layout))

    def exact(self, layout: Layout) -> bool:
        """Of the shared product, as under the scheme that ``factors`` names; the private ones are no mean at all."""
        return MODES[self.factors].exact(_shared(layout))

    def phase(self, round: int, layout: Layout) -> Phase:
        """The phase of the scheme that moves the shared pair, and both private factors in every round."""
        shared = MODES[self.factors].phase(check_round(round), _shared(layout))
        return Phase(shared.name, shared.roles, private=layout.roles & PRIVATE)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of what is shared."""
        return difference(before, after, phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move what is shared."""
        return move(current, mean, phase, optimizer, state)


def _shared(layout: Layout) -> Layout:
    return layout.subset(layout.roles - PRIVATE)
