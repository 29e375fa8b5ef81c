"""Rules that pick whole parts by their distances: Krum and multi-Krum (Blanchard et al. 2017, arXiv 1703.02757), Bulyan (1802.07927).

Distances come from one Gram matrix in product space. What is picked is averaged without weights, as in the papers: example counts
are self-reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.factors import Matrix
from fedpeft.schemes.base import Part, Phase
from fedpeft.schemes.robust.coordinates import nearest_mean
from fedpeft.schemes.robust.geometry import check_metric, distances, metric
from fedpeft.schemes.robust.rule import admit, mean, refuse_products
from fedpeft.tensors import Layout, Tensors

Liars = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Krum:
    """The one part whose ``n - f - 2`` nearest neighbours are nearest, against ``f`` liars."""

    f: Liars = 1
    kind: ClassVar[str] = "krum"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "f sites"
    cost: ClassVar[str] = "n^2 d"

    @property
    def least(self) -> int:
        """``2 f + 3``."""
        return 2 * self.f + 3

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse two of three factors at once."""
        check_metric(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The chosen part's values, bit for bit."""
        admit(self, current, parts, phase)
        squared = distances(metric(current, phase), [part.values for part in parts])
        return Tensors(parts[0].values.layout, parts[nearest(squared, self.f, 1)[0]].values.flat.copy())


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the ``m`` parts that Krum likes best, against ``f`` liars; ``m = 0`` stands for ``n - f - 2``."""

    f: Liars = 1
    m: Annotated[int, Field(ge=0)] = 0
    kind: ClassVar[str] = "multikrum"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "f sites"
    cost: ClassVar[str] = "n^2 d"

    @property
    def least(self) -> int:
        """``2 f + 3``, and enough for ``m`` parts to be picked without a liar."""
        return max(2 * self.f + 3, self.m + self.f + 2)

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse two of three factors at once."""
        check_metric(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The unweighted mean of the chosen parts."""
        admit(self, current, parts, phase)
        squared = distances(metric(current, phase), [part.values for part in parts])
        return mean(parts, nearest(squared, self.f, self.m or len(parts) - self.f - 2))


@dataclass(frozen=True)
class Bulyan:
    """Krum ``n - 2 f`` times without putting back, then of every coordinate the mean of the ``n - 4 f`` values nearest to the median."""

    f: Liars = 1
    kind: ClassVar[str] = "bulyan"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "f sites, also lies in few coordinates"
    cost: ClassVar[str] = "n^2 d"

    @property
    def least(self) -> int:
        """``4 f + 3``."""
        return 4 * self.f + 3

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse phases in which two roles that multiply move together."""
        refuse_products(self.kind, layout, phase)
        check_metric(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """Selection by distance keeps far parts out; the second half keeps out liars that hide in few coordinates."""
        admit(self, current, parts, phase)
        squared = distances(metric(current, phase), [part.values for part in parts])
        chosen = one_by_one(squared, self.f, len(parts) - 2 * self.f)
        return nearest_mean([parts[place].values for place in chosen], len(parts) - 4 * self.f)


def nearest(squared: Matrix, f: int, count: int) -> list[int]:
    """The ``count`` places of least score, best first: the sum of the ``n - f - 2`` smallest squared distances (at least one) to others.

    Where one neighbour is counted, two parts tie; the one nearer to all others then goes first, whichever arrived first.
    """
    others = np.sort(squared, axis=1)[:, 1:]
    scores = others[:, : max(len(squared) - f - 2, 1)].sum(axis=1)
    return [int(place) for place in np.lexsort((others.sum(axis=1), scores))[:count]]


def one_by_one(squared: Matrix, f: int, count: int) -> list[int]:
    """``count`` places, each Krum's choice among those still left."""
    left = list(range(len(squared)))
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(left.pop(nearest(squared[np.ix_(left, left)], f, 1)[0]))
    return chosen
