"""What a federated averaging scheme is: which roles move in a round, what a site contributes, how the mean moves the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from fedpeft.errors import UpdateError
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Layout, Tensors

MULTIPLY: tuple[frozenset[str], ...] = tuple(map(frozenset, (("A", "B"), ("A", "M"), ("B", "M"), ("down", "up"))))
"""Roles that enter the model as a product of one another; when both of a pair move, their product has cross terms."""


@dataclass(frozen=True)
class Phase:
    """What one round does: the ``roles`` that train at the sites, travel up and move at the coordinator."""

    name: str
    roles: frozenset[str]


class Scheme(Protocol):
    """A federated averaging scheme; both halves of a round are here.

    ``sum_only``: the coordinator needs nothing but the sum over sites, so secure aggregation may hide the terms.
    """

    kind: ClassVar[str]
    sum_only: ClassVar[bool]

    def roles(self, layout: Layout) -> frozenset[str]:
        """The roles of ``layout`` that ever move."""
        ...

    def exact(self, layout: Layout) -> bool:
        """Whether every product of factors moves by exactly the weighted mean of the sites' products, in every round."""
        ...

    def phase(self, round: int, layout: Layout) -> Phase:
        """The phase of ``round``, counted from 1. Raises `UpdateError` when it is smaller."""
        ...

    def contribution(self, before: Tensors, after: Tensors, phase: Phase) -> Tensors:
        """Site: the delta of the phase's roles."""
        ...

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Coordinator: move ``current`` by the ``mean`` contribution; with the optimizer's next state."""
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
    if "A" in phase.roles and "B" not in phase.roles and "B" in current.layout.roles and not current.pick({"B"}).flat.any():
        raise UpdateError("scheme: this round moves A while B is all zero, which has no gradient; start the task with a round of B")


def difference(before: Tensors, after: Tensors, phase: Phase) -> Tensors:
    """``after`` minus ``before`` on the roles of ``phase``."""
    return after.pick(phase.roles) - before.pick(phase.roles)


def move(current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
    """Move the roles of ``phase`` by the optimizer's step on ``mean``; all others keep their bits.

    Raises:
        UpdateError: ``mean`` is not of the phase's layout, or is not finite.
    """
    if mean.layout != current.layout.subset(phase.roles):
        raise UpdateError(
            f"scheme: the mean holds roles {sorted(mean.layout.roles)}, phase {phase.name!r} of this adapter needs "
            f"{sorted(current.layout.roles & phase.roles)}; was it summed in another round?"
        )
    if not mean.finite:
        raise UpdateError("scheme: the mean is not finite; drop the round and look for a diverging site")
    step, state = optimizer.step(mean, state)
    return current.patch(current.pick(phase.roles) + step), state
