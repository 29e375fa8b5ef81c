"""What schemes share that need every site's factors in the clear: the sites' products, the fold, and how what they settle moves.

The mean product of a round is M = Σ p_i B_i A_i, with p_i the normalised weights. The fold is the adapter's second pair (A2, B2), which
only the coordinator moves: ``method.extra`` is its capacity, and what does not fit is truncated and reported as ``lost``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.factors import Factor, Pair, Product
from fedpeft.schemes.base import Part, Phase, check_round, linear
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import matrices
from fedpeft.tensors import Layout, Tensors

FACTORS, FOLD = frozenset({"A", "B"}), frozenset({"A2", "B2"})
SECOND = ("B2", "A2")
Named = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Gathered(Tensors):
    """What a scheme made of the parts; ``lost`` is the share of the energy that it had to truncate. Only ``flat`` is kept on disk."""

    lost: float = 0.0


def lost(mean: Tensors) -> dict[str, float]:
    """``{"lost": share}`` for what was just gathered; empty for tensors read back from a store."""
    return {"lost": mean.lost} if isinstance(mean, Gathered) else {}


def both(round: int, layout: Layout, settles: frozenset[str] = frozenset()) -> Phase:
    """All but the fold trains and travels; ``settles`` may be the fold."""
    check_round(round)
    return Phase("all", layout.roles - FOLD, settles=settles)


def never_truncated(layout: Layout, roles: tuple[str, str]) -> bool:
    """Whether the pairs of ``roles`` have room for any product of their modules, and nothing multiplies the product."""
    shape = {entry.name: entry.shape for entry in layout.entries}
    room = all(shape[pair.a][0] >= min(shape[pair.b][0], shape[pair.a][1]) for pair in matrices(layout, roles))
    return room and linear((layout.roles - FOLD) - {"A"})


def shares(parts: Sequence[Part]) -> list[float]:
    """Weights that add up to 1. Raises `UpdateError` without parts."""
    if not parts:
        raise UpdateError("scheme: no site contributed; nothing can be gathered")
    total = sum(part.weight for part in parts)
    return [part.weight / total for part in parts]


@dataclass(frozen=True)
class Round:
    """The parts of one round by tensor name: where the sites started, how each moved, its share, and what the coordinator makes of it.

    ``made`` are views of ``out``: deltas on the roles that move, at first the weighted mean of what travelled, and zeros on the fold.
    """

    start: Named
    moved: Sequence[Named]
    shares: Sequence[float]
    out: Tensors
    made: Named

    @staticmethod
    def of(current: Tensors, parts: Sequence[Part], phase: Phase) -> Round:
        """Open ``parts``. Raises `UpdateError` when there are none, or one is of another layout or not finite."""
        out = Tensors.zeros(current.layout.subset(phase.moves)).patch(mean_of(parts, current.layout.subset(phase.roles)))
        return Round(current.named(), [part.values.named() for part in parts], shares(parts), out, out.named())

    def products(self, pair: Pair) -> list[Product]:
        """The terms p_i B_i A_i of one module."""
        b, a = self.start[pair.b], self.start[pair.a]
        return [Product((b + m[pair.b]) * np.float32(p), a + m[pair.a]) for p, m in zip(self.shares, self.moved, strict=True)]

    def crosses(self, pair: Pair) -> list[Product]:
        """The terms of M - B̄ Ā = Σ p_i (B_i - B̄)(A_i - Ā) of one module; the start that the sites share cancels exactly."""
        b, a = self.made[pair.b], self.made[pair.a]
        return [Product((m[pair.b] - b) * np.float32(p), m[pair.a] - a) for p, m in zip(self.shares, self.moved, strict=True)]

    def fold(self, second: Pair) -> Product:
        """What was folded before this round."""
        return Product(self.start[second.b], self.start[second.a])

    def put(self, pair: Pair, product: tuple[Factor, Factor]) -> None:
        """Make ``pair`` the ``product``."""
        for name, wanted in ((pair.b, product[0]), (pair.a, product[1])):
            self.made[name][...] = wanted - self.start[name]


def mean_of(parts: Sequence[Part], layout: Layout) -> Tensors:
    """The weighted mean of all that travelled, float64 inside. Raises `UpdateError` as `Round.of` does."""
    total = np.zeros(layout.size)
    for share, part in zip(shares(parts), parts, strict=True):
        if part.values.layout != layout or not part.values.finite:
            raise UpdateError("scheme: a site's part is of another layout or not finite; drop it and look for a diverging site")
        total += share * part.values.flat
    return Tensors(layout, total.astype(np.float32))


def folds(layout: Layout) -> list[tuple[Pair, Pair]]:
    """The trained pair and the fold of every module."""
    return list(zip(matrices(layout), matrices(layout, SECOND), strict=True))


def settle(current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
    """Move factors and fold to where they were gathered, and all other roles by the optimizer's step on their mean.

    Factors that were re-split have no gradient that an optimizer could follow.

    Raises:
        UpdateError: ``mean`` is not of the phase's layout, or is not finite.
    """
    if mean.layout != current.layout.subset(phase.moves) or not mean.finite:
        raise UpdateError("scheme: what was gathered is not finite or of another layout; was it made in another round?")
    rest = phase.roles - FACTORS
    step, state = optimizer.step(mean.pick(rest), state)
    moved = current.pick(phase.moves) + mean.patch(step)
    return current.patch(moved), state
