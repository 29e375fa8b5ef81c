"""Factors are turned towards the last global ones before they are averaged (FedRot-LoRA, arXiv 2602.23638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.factors import Matrix
from fedpeft.schemes import drift
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import every_pair, require
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FedRot:
    """Both factors train; a site sends (B Oᵀ, O A), the same product in the coordinates nearest to the last global adapter.

    Odd rounds fit O to A, even ones to B. ``rotate`` is how far towards the fit: 1 takes the nearest orthogonal matrix, reflections
    included; below 1 the nearest rotation is mixed with the identity and made orthogonal again (a path to a reflection would pass
    through a singular matrix). It cannot make averaging exact, only its cross term small where sites re-parameterise; ``probes``
    columns per module measure that term (`drift`).
    """

    kind: ClassVar[str] = "fedrot"
    sum_only: ClassVar[bool] = True

    rotate: Annotated[float, Field(ge=0, le=1)] = 0.5
    probes: Annotated[int, Field(ge=0)] = 4

    def check(self, layout: Layout) -> None:
        """Two factors that multiply as matrices."""
        require(self.kind, layout, frozenset("AB"), 'set method.kind = "lora", or scheme.kind = "fedavg"')

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """False: both factors move."""
        return False

    def phase(self, round: int, layout: Layout) -> Phase:
        """Everything moves; the name says which factor is aligned."""
        return Phase("align A" if check_round(round) % 2 else "align B", layout.roles)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles and the probes."""
        return drift.travels(layout, phase, self.probes)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything after turning the factors, and the probes."""
        turned = Tensors(after.layout, after.flat.copy())
        old, new = before.named(), turned.named()
        for pair in every_pair(before.layout, phase.roles):
            b, a = new[pair.b].astype(np.float64), new[pair.a].astype(np.float64)
            fit = old[pair.a] @ a.T if phase.name == "align A" else old[pair.b].T @ b
            turn = rotation(fit.astype(np.float64), self.rotate)
            new[pair.b][...], new[pair.a][...] = b @ turn.T, turn @ a
        return drift.probed(before, difference(before, turned, phase), phase, self.probes)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move everything by the optimizer's step."""
        return move(current, mean, phase, optimizer, state)

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """The share of the update that averaging loses although the factors were turned."""
        return drift.rho(current, mean, phase, self.probes)


def rotation(fit: Matrix, share: float = 1.0) -> Matrix:
    """The orthogonal O (r, r) of largest tr(fitᵀ O), the Procrustes solution, or the part ``share`` of the way to it.

    With ``fit = A_ref Aᵀ`` (or ``B_refᵀ B``) O A is the nearest to A_ref (B Oᵀ to B_ref). The identity where ``fit`` is zero.
    """
    if share == 0.0 or not fit.any():
        return np.eye(len(fit))
    nearest = _polar(fit)
    if share == 1.0:
        return nearest
    left, _, right = np.linalg.svd(fit)
    left[:, -1] *= np.sign(np.linalg.det(nearest))
    return _polar((1.0 - share) * np.eye(len(fit)) + share * (left @ right))


def _polar(matrix: Matrix) -> Matrix:
    """The orthogonal factor of ``matrix``."""
    left, _, right = np.linalg.svd(matrix)
    nearest: Matrix = left @ right
    return nearest
