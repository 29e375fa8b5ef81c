"""What a federated averaging scheme is: which roles move in a round, what a site contributes, how the mean moves the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Layout, Tensors

CHAINS = (
    "A B M",
    "A2 B2 M",
    "A B R",
    "down up",
    "alpha theta",
    "rotation source",
    "slow fast_down fast_up",
    "ladder rung gate top",
    "P E Q",
    "P Q router router",
    "w1a w1b w2a w2b",
    "left middle right",
    "skew skew scale",  # a pair with itself: a rotation is no linear function of what is trained
    "reflectors reflectors",
    "latent latent",
    "logits logits bank",
    "A B M scale",
    "delta scale",
    "A B router",
    "A B gate",
    "down up gate",
    "keys values gate",
    "query key value",
    "prompt row column",
    "prompt rows cols",
    "prompt encoder encoder",
    "prompt gate",
    "down up norm prompt",
)
MULTIPLY: tuple[frozenset[str], ...] = tuple(frozenset(pair) for chain in CHAINS for pair in combinations(chain.split(), 2))
"""Roles that enter the model as a product of one another; when both of a pair move, their product has cross terms."""

FROZEN = frozenset({"index", "expert", "held"})
"""Roles that are part of an adapter from its first round on and that no round moves: positions of a sparse delta, other adapters'
experts, the pair that takes a start back."""


@dataclass(frozen=True)
class Phase:
    """What one round does: ``roles`` train at the sites, travel up and move at the coordinator.

    ``private`` roles train as well and stay at the site; ``settles`` are further roles that only the coordinator moves.
    `FROZEN` roles are in none of them, whatever a scheme asks for.
    """

    name: str
    roles: frozenset[str]
    private: frozenset[str] = frozenset()
    settles: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for part in ("roles", "private", "settles"):
            object.__setattr__(self, part, getattr(self, part) - FROZEN)

    @property
    def trains(self) -> frozenset[str]:
        """Roles that get gradients at the sites."""
        return self.roles | self.private

    @property
    def moves(self) -> frozenset[str]:
        """Roles of the global adapter that may differ after the round."""
        return self.roles | self.settles


@dataclass(frozen=True)
class SiteContext:
    """What a site knows when it trains: the round's public ``seed`` of the task, its own name, and how large a rank it can train.

    ``control`` is SCAFFOLD's pair (global, own) of gradient corrections; ``gradient`` the mean raw gradient of the round, known
    after training.
    """

    seed: int
    name: str = ""
    rank: int | None = None
    control: tuple[Tensors, Tensors] | None = None
    gradient: Tensors | None = None


@dataclass(frozen=True)
class Part:
    """One site's contribution in the clear: its weight in (0, 1] and what travelled."""

    weight: float
    values: Tensors


class Scheme(Protocol):
    """A federated averaging scheme; both halves of a round are here.

    ``sum_only``: the coordinator needs nothing but the sum over sites, so secure aggregation may hide the terms. A scheme that
    needs each site's part is a `Gathers` as well; what else a scheme may be is in the Protocols below.
    """

    kind: ClassVar[str]
    sum_only: ClassVar[bool]

    def check(self, layout: Layout) -> None:
        """Raise `UpdateError`, with the setting to change, where the scheme can do nothing with an adapter of ``layout``."""
        ...

    def roles(self, layout: Layout) -> frozenset[str]:
        """The roles of ``layout`` that ever move."""
        ...

    def exact(self, layout: Layout) -> bool:
        """Whether every product of factors moves by exactly the weighted mean of the sites' products, in every round."""
        ...

    def phase(self, round: int, layout: Layout) -> Phase:
        """The phase of ``round``, counted from 1. Raises `UpdateError` when it is smaller."""
        ...

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The layout of what a site sends: the phase's roles, and what the scheme adds to them (probes, masses, sketches)."""
        ...

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """Site: what travels, of the layout that `travels` gives; deltas for the phase's roles."""
        ...

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Coordinator: move ``current`` by the ``mean`` contribution; with the optimizer's next state.

        ``mean`` is of the layout of `travels`, or what `Gathers.gather` made of the parts.
        """
        ...


@runtime_checkable
class Gathers(Protocol):
    """A scheme that needs every site's part in the clear (``sum_only = False``)."""

    def gather(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """What replaces the mean: deltas of ``current`` on the roles that the phase ``moves``, weights normalised here."""
        ...


@runtime_checkable
class Masks(Protocol):
    """A scheme under which a site trains only some coordinates."""

    def mask(self, layout: Layout, phase: Phase, site: SiteContext) -> NDArray[np.bool_] | None:
        """True where ``site`` trains, over ``layout.subset(phase.trains)``; None: everywhere."""
        ...


@runtime_checkable
class Controls(Protocol):
    """A scheme whose sites correct their gradients (SCAFFOLD)."""

    def control(self, layout: Layout, phase: Phase, state: State) -> Tensors:
        """The global correction that goes down with the plan, of ``layout.subset(phase.roles)``; zeros at first."""
        ...


@runtime_checkable
class Reports(Protocol):
    """A scheme that can say from the mean alone how much averaging lost."""

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """``{"drift": rho}``: the cross term over the whole update, rho = ||C|| / ||U|| over all modules; empty when unknown.

        ``current`` is the adapter before the round. A rho above 0.5 means that averaging loses more than half of the update.
        """
        ...


def factored(layout: Layout) -> bool:
    """Whether ``layout`` holds LoRA's two factors; every other method is of the linear class and moves whole."""
    return {"A", "B"} <= layout.roles


def linear(roles: frozenset[str]) -> bool:
    """Whether no two of ``roles`` multiply one another, so that averaging them averages what they make."""
    return not any(pair <= roles for pair in MULTIPLY)


def check_round(round: int) -> int:
    """``round`` itself. Raises `UpdateError` unless it is at least 1."""
    if round < 1:
        raise UpdateError(f"scheme: round {round} does not exist; rounds count from 1")
    return round


def check_start(current: Tensors, phase: Phase) -> None:
    """Refuse a phase that cannot learn: A moves while B is zero, so A's gradient is zero (ALGORITHMS E.7).

    Raises:
        UpdateError: the phase would be such a wasted round.
    """
    if "A" in phase.trains and "B" not in phase.trains and "B" in current.layout.roles and not current.pick({"B"}).flat.any():
        raise UpdateError("scheme: this round moves A while B is all zero, which has no gradient; start the task with a round of B")


def difference(before: Tensors, after: Tensors, phase: Phase) -> Tensors:
    """``after`` minus ``before`` on the roles of ``phase``."""
    return after.pick(phase.roles) - before.pick(phase.roles)


def move(current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
    """Move the roles of ``phase`` by the optimizer's step on ``mean``; all others keep their bits.

    What a scheme added to the wire besides the phase's roles is left out.

    Raises:
        UpdateError: ``mean`` is not of the phase's layout, or is not finite.
    """
    part = mean.pick(phase.roles)
    if part.layout != current.layout.subset(phase.roles):
        raise UpdateError(
            f"scheme: the mean holds roles {sorted(mean.layout.roles)}, phase {phase.name!r} of this adapter needs "
            f"{sorted(current.layout.roles & phase.roles)}; was it summed in another round?"
        )
    if not mean.finite:
        raise UpdateError("scheme: the mean is not finite; drop the round and look for a diverging site")
    step, state = optimizer.step(part, state)
    return current.patch(current.pick(phase.roles) + step), state
