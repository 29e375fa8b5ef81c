"""The cross term that averaging both factors loses, recovered from sums of sketches (ours; after Tropp et al. 2017, arXiv 1609.00048)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.factors import Matrix, Pair, Product, truncate
from fedpeft.schemes import drift
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import forget, matrices, require, signs
from fedpeft.tensors import Entry, Layout, Tensors

FOLD = frozenset({"A2", "B2"})
WORST = 0.7
"""Share of a module's cross term that its recovery may leave unexplained on the probes; a worse one is not used."""
CUT = 1e-5
"""Singular values of a core below this share of the largest are rounding, not signal."""


@dataclass(frozen=True)
class Sketch:
    """Both factors train, and C = Σ p_i B_i A_i - B̄ Ā is rebuilt from two sums per module, without showing any site's part.

    With dB_i, dA_i a site's deltas, C = Σ p_i dB_i dA_i - dB dA. Sites add Y_i = dB_i (dA_i Ω) and Z_i = (Ψ dB_i) dA_i to their deltas,
    for public random signs Ω (n, ``width``) and Ψ (``width``, m) that change every round. From the means the coordinator has C Ω and
    Ψ C, and C = C Ω (Ψ C Ω)⁺ Ψ C when ``width`` is at least the rank of C, which is at most (sites - 1) r; take a third more, or the
    inverse magnifies rounding. For few sites, then: exactness costs ``width`` / r times the bytes of the factors. ``probes`` columns
    check each module's result.

    With ``method.extra`` the cross term is folded into the second pair, which only the coordinator moves and which keeps its best
    part when full; without it B̄ Ā + C is cut back to rank r. Not for use with central noise: the inverse multiplies it.
    """

    kind: ClassVar[str] = "sketch"
    sum_only: ClassVar[bool] = True

    width: Annotated[int, Field(ge=1)] = 32
    probes: Annotated[int, Field(ge=1)] = 4

    def check(self, layout: Layout) -> None:
        """Two factors that multiply as matrices."""
        require(self.kind, layout, frozenset("AB"), 'set method.kind = "lora", or scheme.kind = "fedavg"')

    def roles(self, layout: Layout) -> frozenset[str]:
        """All; the second pair by the coordinator alone."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """False: it depends on the sites' number, and on the room in the second pair."""
        return False

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        check_round(round)
        return Phase("all", layout.roles - FOLD, settles=layout.roles & FOLD)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles, the probes and two sketches per module."""
        shape = {entry.name: entry.shape for entry in layout.entries}
        found = [e for pair in matrices(layout) for e in _entries(pair, shape[pair.b][0], shape[pair.a][1], self.width)]
        return Layout.of([*drift.travels(layout, phase, self.probes).entries, *found])

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything, its probes and its sketches."""
        delta = difference(before, after, phase)
        out = Tensors.zeros(self.travels(before.layout, phase)).patch(drift.probed(before, delta, phase, self.probes))
        views, named, seed = out.named(), delta.named(), _seed(before, phase)
        for pair in matrices(before.layout):
            y, z = self._sketch(seed, pair, _product(named, pair))
            views[f"sketch/y/{pair.b}"][...], views[f"sketch/z/{pair.a}"][...] = y, z
        return out

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move everything by the optimizer's step, then add the recovered cross terms.

        Where they are cut into the first pair, its moments are dropped: they belong to other coordinates.
        """
        moved, state = move(current, mean, phase, optimizer, state)
        found = self._recovered(current, mean, phase)
        for pair, cross in found.items():
            _fold(moved, pair, cross) if phase.settles else _cut(moved, pair, cross)
        return moved, forget(state, frozenset("AB")) if found and not phase.settles else state

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """What averaging loses before the cross term is added, and in how many modules of all it was recovered."""
        seen = drift.rho(current, mean, phase, self.probes)
        used = len(self._recovered(current, mean, phase)) / len(matrices(current.layout))
        return seen | {"recovered": used} if seen else {}

    def _sketch(self, seed: str, pair: Pair, x: Product) -> tuple[Matrix, Matrix]:
        """(x Ω, Ψ x), about as large as the entries of x, so that what the grid takes of the deltas it takes of these."""
        omega = signs(f"omega {seed} {pair.a}", (x.a.shape[1], self.width)) / sqrt(x.a.shape[1])
        psi = self._psi(seed, pair, len(x.b))
        return x.b @ (x.a @ omega), (psi @ x.b) @ x.a

    def _psi(self, seed: str, pair: Pair, height: int) -> Matrix:
        return signs(f"psi {seed} {pair.b}", (self.width, height)) / sqrt(height)

    def _recovered(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[Pair, Product]:
        """The cross terms that the probes confirm."""
        return {pair: cross for pair, (cross, left) in self.tried(current, mean, phase).items() if left < WORST}

    def tried(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[Pair, tuple[Product, float]]:
        """Each module's rebuilt cross term, and the share of C that it leaves unexplained, told by the probes (1 where C is zero)."""
        named, seed, found = mean.named(), _seed(current, phase), {}
        for pair in matrices(current.layout):
            moved = _product(named, pair)
            y, z = self._sketch(seed, pair, moved)
            psi = self._psi(seed, pair, len(moved.b))
            cross = recover(named[f"sketch/y/{pair.b}"] - y, named[f"sketch/z/{pair.a}"] - z, psi)
            probe = drift.Probe.of(seed, pair, (len(moved.b), moved.a.shape[1]), self.probes)
            seen = named[f"probe/{pair.b}"].astype(np.float64) - probe(moved)
            size = float(np.linalg.norm(seen))
            found[pair] = cross, float(np.linalg.norm(seen - probe(cross))) / size if size else 1.0
        return found


def recover(y: Matrix, z: Matrix, psi: Matrix) -> Product:
    """X from y = X Ω (m, k) and z = ``psi`` X (k, n), as factors of rank at most k: y (psi y)⁺ z."""
    u, s, vt = np.linalg.svd(psi @ y)
    kept = s > CUT * s[0]
    return Product(y @ vt[kept].T / s[kept], u[:, kept].T @ z)


def _fold(moved: Tensors, pair: Pair, cross: Product) -> None:
    """Add ``cross`` to the second pair in place."""
    b, a = (moved.named()[name.replace(f"lora_{role}", f"lora_{role}2")] for name, role in ((pair.b, "B"), (pair.a, "A")))
    found = truncate([(b.astype(np.float64), a.astype(np.float64)), cross], len(a))
    b[...], a[...] = found.b, found.a


def _cut(moved: Tensors, pair: Pair, cross: Product) -> None:
    """Add ``cross`` to the first pair in place, cut back to its rank; a slot left empty keeps its row of A, to learn with."""
    b, a = moved.named()[pair.b], moved.named()[pair.a]
    found = truncate([(b.astype(np.float64), a.astype(np.float64)), cross], len(a))
    b[...], a[...] = found.b, np.where(found.a.any(axis=1, keepdims=True), found.a, a)


def _entries(pair: Pair, m: int, n: int, width: int) -> tuple[Entry, Entry]:
    return Entry("sketch", f"sketch/y/{pair.b}", (m, width)), Entry("sketch", f"sketch/z/{pair.a}", (width, n))


def _product(named: Mapping[str, NDArray[np.float32]], pair: Pair) -> Product:
    return Product(named[pair.b].astype(np.float64), named[pair.a].astype(np.float64))


def _seed(before: Tensors, phase: Phase) -> str:
    """Both sides hold what the round starts from; it changes every round."""
    return before.pick(phase.roles).digest
