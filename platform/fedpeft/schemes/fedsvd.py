"""B trains, and the coordinator re-splits B A after each round so that A is orthonormal (FedSVD, Lee et al. 2025, arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpeft.factors import Matrix
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, linear, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import check_rank, matrices, require
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FedSVD:
    """As `FFA`, with A turned after each round: B A = U S Vᵀ, B := U S, A := Vᵀ.

    A's rows stay in the row space of its random start (row(Vᵀ) is in row(B A)), so it can express what `FFA` can; what it gains
    is an orthonormal A, under which a clip of dB is a clip of dB A. While B is zero nothing is turned.
    """

    kind: ClassVar[str] = "fedsvd"
    sum_only: ClassVar[bool] = True

    def check(self, layout: Layout) -> None:
        """Two factors that multiply as matrices, of a rank that can be orthonormal."""
        require(self.kind, layout, frozenset("AB"), 'set method.kind = "lora", or scheme.kind = "fedavg"')
        check_rank(self.kind, layout)

    def roles(self, layout: Layout) -> frozenset[str]:
        """All; A by the coordinator alone."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """True unless two multiplied roles still move together (DoRA's magnitude with B)."""
        return linear(layout.roles - {"A"})

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        check_round(round)
        return Phase("B", layout.roles - {"A"}, settles=frozenset("A"))

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of all but A."""
        return difference(before, after, phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move B and the rest, then turn B, A and the moments of B into the new coordinates; the product stays."""
        moved, state = move(current, mean, phase, optimizer, state)
        named, turns = moved.named(), {}
        for pair in matrices(moved.layout):
            b, a = named[pair.b].astype(np.float64), named[pair.a].astype(np.float64)
            if b.any():
                turns[pair.b], named[pair.a][...] = turn(b, a)
                named[pair.b][...] = b @ turns[pair.b]
        return moved, _turned(state, moved.layout.subset({"B"}), turns)


def turn(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """(T, A') with A' (r, n) orthonormal, T A' = A, and the columns of b T orthogonal, by falling length; b (m, r), a (r, n).

    Only (r, r) matrices are decomposed. Where the rank of b a falls, the rows of A' left over still span the rest of a's rows.
    """
    right, upper = np.linalg.qr(a.T)
    core = b @ upper.T
    basis = np.linalg.eigh(core.T @ core)[1][:, ::-1]
    return upper.T @ basis, basis.T @ right.T


def _turned(state: State, layout: Layout, turns: Mapping[str, Matrix]) -> State:
    """First moments turn as B does; of second moments the squares, as if coordinates were independent."""
    out = dict(state)
    for key, power in (("B.m", 1), ("B.v", 2)):
        if key in state:
            moments = Tensors(layout, state[key].copy())
            for name, matrix in turns.items():
                moments.named()[name][...] = moments.named()[name] @ matrix**power
            out[key] = moments.flat
    return out
