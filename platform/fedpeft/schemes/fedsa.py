"""One factor shared, the other private to each site (FedSA-LoRA, Guo et al. 2024, arXiv 2410.01463; mirror Fed-ALoRA, 2509.25414)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import require_roles
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FedSA:
    """Both factors train; ``share`` says which one travels, the other stays at its site for ever.

    Site i works with B_i A (share A) or B A_i (share B): a personal model. The published adapter holds the shared factor with the
    start of the other, so alone it is a start for a newcomer and not a model. Which side to share is contested: A by FedSA and
    HydraLoRA, B by Fed-ALoRA. ``head``: the classification head stays at the site as well, as in FedSA's code, or is shared.
    """

    kind: ClassVar[str] = "fedsa"
    sum_only: ClassVar[bool] = True

    share: Literal["A", "B"] = "A"
    head: Literal["shared", "private"] = "private"

    def check(self, layout: Layout) -> None:
        """Two factors are needed, one to share and one to keep."""
        require_roles(self.kind, layout, frozenset("AB"), 'set method.kind = "lora", or scheme.kind = "fedavg"')

    def roles(self, layout: Layout) -> frozenset[str]:
        """All but what stays at the sites."""
        return layout.roles - self._kept(layout)

    def exact(self, layout: Layout) -> bool:
        """False: every site has its own product, and the global one is not their mean."""
        return False

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        check_round(round)
        return Phase(f"share {self.share}", self.roles(layout), private=self._kept(layout))

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles: about half the bytes of `FedAvg`."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of what is shared."""
        return difference(before, after, phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move what is shared."""
        return move(current, mean, phase, optimizer, state)

    def _kept(self, layout: Layout) -> frozenset[str]:
        kept = {"B" if self.share == "A" else "A"} | ({"head"} if self.head == "private" else set())
        return layout.roles & kept
