"""The metric in which a factor's step is what it does to the weights: ||dB A||, while A stands still (ALGORITHMS A6).

Noise of equal size on every entry of dB is of unequal size in dB A unless A's rows are orthonormal. In the coordinates
y = dB (A A^T)^(1/2) both are the same: clip and noise act on y, and the way back is processing of what was released. The map
is made of the round's global adapter, which is public, so that privacy does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.factors import Pair, pairs
from fedpeft.tensors import Tensors

Square = NDArray[np.float64]

FLATTEST = 1e-3
"""Smallest eigenvalue kept, over the largest: noise along a direction that hardly acts grows thirtyfold at most."""
FACTORS = (("B", "A"), ("B2", "A2"))


@dataclass(frozen=True)
class Metric:
    """One map per factor that moves: ``maps[name]`` (r, r) acts on the rank's axis, ``left`` names those where that is the first."""

    maps: dict[str, Square]
    left: frozenset[str]

    @staticmethod
    def of(current: Tensors, roles: frozenset[str]) -> Metric:
        """The metric of a round that moves ``roles`` of ``current``; tensors that are no factors keep theirs.

        Raises:
            PrivacyError: both factors of a pair move, which no such metric describes.
        """
        named, maps, left = current.named(), {}, set()
        for one, down in _moving(current, roles):
            still = named[one.b if down else one.a].astype(np.float64)
            maps[one.a if down else one.b] = _root(still.T @ still if down else still @ still.T)
            left |= {one.a} if down else set()
        return Metric(maps, frozenset(left))

    def into(self, delta: Tensors) -> Tensors:
        """``delta`` in coordinates whose Euclidean norm is that of what it does to the weights."""
        return self._mapped(delta, self.maps)

    def back(self, delta: Tensors) -> Tensors:
        """Inverse of `into`, up to rounding."""
        return self._mapped(delta, {name: np.linalg.inv(square).astype(np.float64, copy=False) for name, square in self.maps.items()})

    def _mapped(self, delta: Tensors, maps: dict[str, Square]) -> Tensors:
        out = Tensors(delta.layout, delta.flat.copy())
        for name, view in out.named().items():
            if name in maps:
                view[...] = maps[name] @ view if name in self.left else view @ maps[name]
        return out


def _moving(current: Tensors, roles: frozenset[str]) -> list[tuple[Pair, bool]]:
    """The pairs of which one factor moves, and whether it is the right one (A)."""
    found = []
    for b, a in FACTORS:
        if {b, a} <= roles:
            raise PrivacyError(f"privacy: roles {b} and {a} both move; the effective norm needs one of them to stand still")
        if {b, a} <= current.layout.roles and roles & {b, a}:
            found += [(one, a in roles) for one in pairs(current.layout, (b, a))]
    return found


def _root(gram: Square) -> Square:
    """The symmetric square root of ``gram`` (r, r), its spectrum lifted so that it can be inverted; the identity for zero."""
    values, vectors = np.linalg.eigh(gram)
    top = float(values[-1])
    if top <= 0:
        return np.eye(len(gram))
    root: Square = (vectors * np.sqrt(np.maximum(values, FLATTEST * top))) @ vectors.T
    return root
