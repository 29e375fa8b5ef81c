"""What all hosts of a bank read: the shares of the mixture in use, and those that a router decides at each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.mixtures.choice import Choices
from fedpeft.mixtures.gates import Term
from fedpeft.mixtures.plans import Share, blend_of
from fedpeft.mixtures.slabs import Slab, Store


@dataclass(frozen=True, eq=False)
class Routed:
    """A routed term, and where its adapters lie: per slab (column among the term's names, row)."""

    term: Term
    slabs: tuple[tuple[Slab, tuple[tuple[int, int], ...]], ...]

    def shares(self, module: str, x: Tensor) -> list[Share]:
        """The shares that the router gives at ``module`` for its input (..., in)."""
        here = [(slab, places) for slab, places in self.slabs if module in slab.parts]
        if not here:
            return []
        flat = x.reshape(-1, x.shape[-1])
        weights = self._weights(module, flat)
        return [Share(slab, blend_of(_columns(weights, places), [row for _, row in places], slab.capacity)) for slab, places in here]

    def _weights(self, module: str, flat: Tensor) -> Tensor:
        """(N, E), with k entries other than 0 per token."""
        scores, experts = self._ask(module, flat), len(self.term.names)
        if scores.shape != (len(flat), experts):
            raise AdapterError(
                f"gates: the router gave {list(scores.shape)} at {module}; it must give (N, E) = {[len(flat), experts]} for its input"
            )
        top, index = scores.topk(self.term.k, dim=1)
        finite = top.clamp(min=torch.finfo(top.dtype).min)
        chosen = {"softmax": lambda: finite.softmax(1), "none": lambda: finite, "uniform": lambda: torch.full_like(top, 1 / self.term.k)}
        kept = chosen[self.term.normalise]().masked_fill(top == -torch.inf, 0.0)
        return torch.zeros_like(scores).scatter(1, index, kept)

    def _ask(self, module: str, flat: Tensor) -> Tensor:
        router: Any = self.term.router
        if not isinstance(router, Mapping | nn.ModuleDict):
            return router(module, flat)  # type: ignore[no-any-return]
        key = module if module in router else module.replace(".", "/")
        if key not in router:
            raise AdapterError(f"gates: the router knows no module {module}, where {list(self.term.names)[:4]} act; add a callable for it")
        return router[key](flat)  # type: ignore[no-any-return]


@dataclass(eq=False)
class State:
    """The mixture in use; ``choices`` are the ways that were taken where ``way`` leaves them open."""

    store: Store
    way: str = "auto"
    dense: bool = False
    fixed: tuple[Share, ...] = ()
    routed: tuple[Routed, ...] = ()
    heads: tuple[str | None, ...] | None = None
    version: int = 0
    choices: Choices = field(default_factory=Choices)

    def resting(self, module: str) -> list[Slab]:
        """The slabs that act on ``module`` under other gates than these."""
        busy = {id(share.slab) for share in self.fixed} | {id(slab) for routed in self.routed for slab, _ in routed.slabs}
        return [slab for slab in self.store.slabs if module in slab.parts and id(slab) not in busy]

    def shares(self, module: str, x: Tensor) -> list[Share]:
        """All that acts on ``module``, whose input is x."""
        found = [share for share in self.fixed if module in share.slab.parts]
        for routed in self.routed:
            found += routed.shares(module, x)
        return found


def _columns(weights: Tensor, places: tuple[tuple[int, int], ...]) -> Tensor:
    columns = [column for column, _ in places]
    return weights if columns == list(range(weights.shape[1])) else weights[:, columns]
