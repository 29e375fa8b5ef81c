"""Gradients corrected by control variates (SCAFFOLD, Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.errors import UpdateError
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.modes import MODES, Factors
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Entry, Flat, Layout, Tensors


@dataclass(frozen=True)
class Scaffold:
    """A site steps along g - c_i + c and sends its delta with that of c_i; c is the coordinator's mean of all c_i.

    c_i⁺ is the mean raw gradient of the round's steps. Under plain SGD with rate η and K steps this is the paper's option II: from
    y = x - η Σ_k (g_k - c_i + c) follows c_i - c + (x - y) / (K η) = Σ_k g_k / K. It holds under momentum and Adam as well, where
    option II would take the optimizer's step for a gradient. c moves by ``participation`` times the mean change: the paper's
    |S|/N, the share of all sites that answer in a round. The mean weighs sites by their examples, the paper equally. ``factors`` says
    which factors move, for LoRA; corrections belong to a role and wait while it stands still. Twice the bytes up.
    """

    kind: ClassVar[str] = "scaffold"
    sum_only: ClassVar[bool] = True

    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    factors: Factors = "both"

    def check(self, layout: Layout) -> None:
        """Any layout will do."""

    def roles(self, layout: Layout) -> frozenset[str]:
        """Those of the scheme that ``factors`` names."""
        return MODES[self.factors].roles(layout)

    def exact(self, layout: Layout) -> bool:
        """As the scheme that ``factors`` names: corrections change what sites train, not what averaging does."""
        return MODES[self.factors].exact(layout)

    def phase(self, round: int, layout: Layout) -> Phase:
        """That of the scheme that ``factors`` names."""
        return MODES[self.factors].phase(check_round(round), layout)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles, and as many values of role ``control``."""
        part = layout.subset(phase.roles)
        return Layout.of([*part.entries, *(Entry("control", _name(e), e.shape) for e in part.entries)])

    def control(self, layout: Layout, phase: Phase, state: State) -> Tensors:
        """The global correction c; zeros for what never moved. Raises `UpdateError` when ``state`` is another adapter's."""
        part = layout.subset(phase.roles)
        known = [_known(state, role, part.role_spans[role]) for role in sorted(part.roles)]
        return Tensors(part, np.concatenate(known) if known else np.zeros(0, np.float32))

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything, and c_i⁺ - c_i.

        Raises:
            UpdateError: the site trained without corrections or did not keep its gradient.
        """
        if site.control is None or site.gradient is None:
            raise UpdateError("scheme scaffold: the site gave no corrections or no mean gradient; do both sides run one version?")
        change = site.gradient - site.control[1]
        out = Tensors.zeros(self.travels(before.layout, phase)).patch(difference(before, after, phase))
        out.flat[out.layout.role_spans["control"]] = change.flat
        return out

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move the adapter by the optimizer's step and c by its mean change; c lies in the state as ``control.<role>``."""
        moved, state = move(current, mean, phase, optimizer, state)
        now, change = self.control(current.layout, phase, state), mean.pick({"control"}).flat
        after = now.flat + np.float32(self.participation) * change
        return moved, state | {f"control.{role}": after[span].copy() for role, span in now.layout.role_spans.items()}


def _name(entry: Entry) -> str:
    """Sorted by it, corrections lie in the order of what they correct."""
    return f"control/{entry.role}/{entry.name}"


def _known(state: State, role: str, span: slice) -> Flat:
    size = span.stop - span.start
    kept = state.get(f"control.{role}", np.zeros(size, np.float32))
    if kept.size != size:
        raise UpdateError(f"scaffold: {kept.size} corrections of role {role}, this adapter has {size}; they belong to another adapter")
    return kept
