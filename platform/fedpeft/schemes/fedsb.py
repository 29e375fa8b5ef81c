"""Only a square core travels (Fed-SB, Singhal et al. 2025, arXiv 2502.15436), between factors found by one pass over the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, linear, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import check_rank, forget, require_roles
from fedpeft.tensors import Layout, Tensors

CORE = frozenset("ABR")
Array = NDArray[Any]


def _renew(rounds: int) -> int:
    if rounds and rounds < 3:
        raise ValueError("renew must be 0 (never) or at least 3: two rounds find the factors, the others train the core")
    return rounds


@dataclass(frozen=True)
class FedSB:
    """``y = W x + B R A x``: rounds 1 and 2 find B and A, from then on R (r, r) alone trains and travels, which averages exactly.

    Round 1 trains B over a random A: its mean delta is a sketch of the update's column space, which the coordinator makes
    orthonormal. Round 2 trains A over that B: a sketch of the row space. Then B R A is split so that B and A are
    orthonormal and R carries all that was learnt; the paper takes both from the first full gradient, which no site has to form or
    show here. ``renew``: find new factors every so many rounds, starting from the product reached; 0 never does, and leaves the core
    confined to what the first two rounds saw.
    """

    kind: ClassVar[str] = "fedsb"
    sum_only: ClassVar[bool] = True

    renew: Annotated[int, AfterValidator(_renew)] = 0

    def check(self, layout: Layout) -> None:
        """The method `core` is needed, of a rank that can be orthonormal."""
        require_roles(self.kind, layout, CORE, 'set method.kind = "core"')
        check_rank(self.kind, layout)

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """True: one matrix of the three moves at a time, and splits leave the product alone."""
        return linear(layout.roles - CORE)

    def phase(self, round: int, layout: Layout) -> Phase:
        """``B``, then ``A``, then ``R``; the last round before a renewal folds R into B."""
        place = check_round(round) - 1
        place = place % self.renew if self.renew else place
        active, settles = {0: ("B", "AR"), 1: ("A", "BR")}.get(place, ("R", "B" if place == self.renew - 1 else ""))
        return Phase(active, layout.roles - CORE | {active}, settles=frozenset(settles))

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles: from round 3 on r² values a module."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of the matrix that moves."""
        return difference(before, after, phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move the phase's matrix, then settle the other two with the product unchanged; moments of re-split matrices are dropped."""
        moved, state = move(current, mean, phase, optimizer, state)
        if not phase.settles:
            return moved, state
        settle = SETTLE[phase.name]
        for b, r, a in _modules(moved):
            b[...], r[...], a[...] = settle(*(matrix.astype(np.float64) for matrix in (b, r, a)))
        return moved, forget(state, CORE)


def _columns(b: Array, r: Array, a: Array) -> tuple[Array, Array, Array]:
    """B orthonormal, R the identity, A what keeps the product; while B is zero all stay."""
    if not b.any():
        return b, r, a
    q, upper = np.linalg.qr(b)
    return q, np.eye(len(r)), upper @ r @ a


def _split(b: Array, r: Array, a: Array) -> tuple[Array, Array, Array]:
    """B and A orthonormal, R diagonal: the singular value decomposition of the product, through (r, r) matrices."""
    left, upper = np.linalg.qr(b @ r)
    right, lower = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(upper @ lower.T)
    return left @ u, np.diag(s), vt @ right.T


def _fold(b: Array, r: Array, a: Array) -> tuple[Array, Array, Array]:
    """R into B, so that the next round can train B over A."""
    return b @ r, np.eye(len(r)), a


SETTLE = {"B": _columns, "A": _split, "R": _fold}


def _modules(tensors: Tensors) -> list[tuple[Array, Array, Array]]:
    """Views (B, R, A) by module."""
    named = tensors.named()
    mark = "lora_{}"
    names = [entry.name for entry in tensors.layout.entries if entry.role == "R"]
    return [tuple(named[mark.format(role).join(name.rsplit(mark.format("R"), 1))] for role in "BRA") for name in names]  # type: ignore[misc]
