"""Rules that are weighted means of all parts: geometric median, norm bound, FLTrust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from fedpeft.errors import CohortError, UpdateError
from fedpeft.factors import Matrix
from fedpeft.schemes.base import Part, Phase
from fedpeft.schemes.robust.geometry import check_metric, distances, gram, growth, metric, resize
from fedpeft.schemes.robust.rule import Shares, admit, blend, shares
from fedpeft.tensors import Layout, Tensors

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Length = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class RFA:
    """The geometric median by smoothed Weiszfeld steps (Pillutla et al. 2019, arXiv 1912.13445, algorithm 2).

    Minimises ``sum p_i ||v - x_i||`` with weights clamped to twice the median weight; holds while liars have less than half of
    the weight. Distances are in product space, the weights found there are put on the parts' own tensors.
    """

    iterations: Annotated[int, Field(ge=1, le=1000)] = 32
    nu: Positive = 1e-6
    kind: ClassVar[str] = "rfa"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "liars with less than half of the weight"
    cost: ClassVar[str] = "n^2 d"

    @property
    def least(self) -> int:
        """Three: between two, any point is a geometric median."""
        return 3

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse two of three factors at once."""
        check_metric(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The mean of the parts under the last step's weights."""
        admit(self, current, parts, phase)
        squared = distances(metric(current, phase), [part.values for part in parts])
        return blend(parts, self.weights(squared, shares(parts)))

    def weights(self, squared: Matrix, start: Shares) -> Shares:
        """The parts' shares (n,) in the median, from their squared distances (n, n) and the shares to start from."""
        at = start
        for _ in range(self.iterations):
            away = np.sqrt(np.maximum(squared @ at - at @ squared @ at / 2.0, 0.0))
            pull = start / np.maximum(away, self.nu)
            at = pull / pull.sum()
        return np.asarray(at)


def rfa_by_sums(average: Callable[[Tensors | None], Tensors], iterations: int = 3) -> Tensors:
    """The geometric median from weighted means alone, so that secure aggregation can hide every part; three steps are usual.

    ``average(centre)`` asks all sites: each weighs itself by `rfa_weight` at ``centre`` (None: by its example share) and the sum
    of weighted deltas is divided by the sum of weights, as `Update.mean` does. Where one factor travels it gives what `RFA` gives
    after as many steps. A site that lies about its own weight is not caught: this guards against bad data, not bad software.
    """
    centre = average(None)
    for _ in range(iterations):
        centre = average(centre)
    return centre


def rfa_weight(current: Tensors, part: Part, centre: Tensors, phase: Phase, nu: float = 1e-3) -> float:
    """Site: its weight ``p nu / max(nu, ||centre - x||)`` in (0, p]; ``nu`` is a distance that counts as none.

    Weights travel in steps of 2^-20, so ``nu`` should not be a millionth of the usual distance.
    """
    squared = distances(metric(current, phase), [part.values, centre])
    return part.weight * nu / max(nu, sqrt(squared[0, 1]))


@dataclass(frozen=True)
class NormBound:
    """The weighted mean of parts cut to length ``bound`` (Sun et al. 2019, arXiv 1911.07963); ``bound = 0``: the median length.

    Weights are clamped to twice the median weight. A part is cut by scaling it, until what it changes in the product has that length.
    """

    bound: Length = 0.0
    kind: ClassVar[str] = "norm_bound"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "the size of a lie, not its direction"
    cost: ClassVar[str] = "n d"

    @property
    def least(self) -> int:
        """One with a bound of its own; three for a median length."""
        return 1 if self.bound else 3

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse two of three factors at once."""
        check_metric(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """Each part times the largest factor up to 1 that keeps it within the bound."""
        admit(self, current, parts, phase)
        table = growth(metric(current, phase), [part.values for part in parts])
        lengths = np.sqrt(np.maximum(table.sum(axis=1), 0.0))
        bound = self.bound or float(np.median(lengths))
        factors = [1.0 if length <= bound else resize(row, bound) for row, length in zip(table, lengths, strict=True)]
        return blend(parts, shares(parts) * factors)


@runtime_checkable
class Rooted(Protocol):
    """A rule that needs the coordinator's own delta of the round; its ``combine`` alone always refuses."""

    def combine_rooted(self, current: Tensors, parts: Sequence[Part], phase: Phase, root: Tensors) -> Tensors:
        """As `CombineRule.combine`; ``root`` is what the coordinator got by training ``current`` in ``phase`` on clean rows of its own."""
        ...


@dataclass(frozen=True)
class FLTrust:
    """Trust by the angle to the coordinator's own delta (Cao et al. 2021, arXiv 2012.13995, algorithm 2).

    Each part is scaled to the root's length and weighs ``max(0, cos)``; example counts have no say. The caller gives ``root``, of
    the parts' layout, from a few clean rows that the coordinator holds.
    """

    kind: ClassVar[str] = "fltrust"
    sum_only: ClassVar[bool] = False
    against: ClassVar[str] = "any number of liars, by a root with clean rows"
    cost: ClassVar[str] = "n d"

    @property
    def least(self) -> int:
        """One."""
        return 1

    def check(self, layout: Layout, phase: Phase) -> None:
        """Refuse two of three factors at once."""
        check_metric(self.kind, layout, phase)

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """Refuse: without a root there is nothing to trust."""
        raise UpdateError("fltrust: needs the coordinator's own delta of the round, trained on clean rows; without such rows combine rfa")

    def combine_rooted(self, current: Tensors, parts: Sequence[Part], phase: Phase, root: Tensors) -> Tensors:
        """The trusted mean.

        Raises:
            CohortError: no part points the root's way.
            UpdateError: ``root`` is zero or of another layout; or as `CombineRule.combine`.
        """
        admit(self, current, parts, phase)
        if root.layout != parts[0].values.layout or not root.finite:
            raise UpdateError("fltrust: the root is not finite or of another layout than the parts; train it in the same phase")
        measure, values = metric(current, phase), [part.values for part in parts]
        trust = trusts(gram(measure, [*values, root], np.float64))
        if not trust.any():
            raise CohortError("fltrust: no part points the root's way; look at the coordinator's rows, or drop the round")
        length = sqrt(growth(measure, [root])[0].sum())
        factors = [resize(row, length) for row in growth(measure, values)]
        return blend(parts, trust / trust.sum() * factors)


def trusts(table: Matrix) -> Shares:
    """``max(0, cos)`` of all parts but the last to the last, the root, by inner products. Raises `UpdateError` when the root is zero."""
    lengths = np.sqrt(np.diagonal(table))
    if not lengths[-1] > 0.0:
        raise UpdateError("fltrust: the root delta is zero; train it with a learning rate above 0")
    cosines = table[-1, :-1] / (lengths[-1] * np.where(lengths[:-1] > 0.0, lengths[:-1], 1.0))
    return np.asarray(np.maximum(cosines, 0.0))
