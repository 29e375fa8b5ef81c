"""Any rule over means of random groups (bucketing: Karimireddy et al. 2022, arXiv 2006.09365, section 3).

Of a group nothing but its sum is needed, so secure aggregation may run inside each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, PlainSerializer

from fedpeft.config import build, describe
from fedpeft.errors import UpdateError
from fedpeft.schemes.base import Part, Phase
from fedpeft.schemes.robust.averages import RFA, NormBound
from fedpeft.schemes.robust.coordinates import Median, Trimmed
from fedpeft.schemes.robust.rule import CombineRule, admit, blend, clamped, shares
from fedpeft.schemes.robust.selection import Bulyan, Krum, MultiKrum
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Update

INNER: dict[str, type[CombineRule]] = {
    "bulyan": Bulyan,
    "krum": Krum,
    "median": Median,
    "multikrum": MultiKrum,
    "norm_bound": NormBound,
    "rfa": RFA,
    "trimmed": Trimmed,
}
"""Rules that can stand over groups."""

Inner = Annotated[Any, BeforeValidator(lambda value: build(INNER, value, "rule")), PlainSerializer(describe)]


@dataclass(frozen=True)
class Buckets:
    """Random groups of at least ``size`` sites, the weighted mean inside each, then ``rule`` over the groups' means.

    A liar spoils its whole group, so the rule's count of liars is one of groups.
    """

    size: Annotated[int, Field(ge=2)] = 5
    rule: Inner = field(default_factory=RFA)
    kind: ClassVar[str] = "buckets"
    sum_only: ClassVar[bool] = True
    against: ClassVar[str] = "as many groups as its rule, each spoiled by one liar"
    cost: ClassVar[str] = "n d, and the rule's of n / size"

    @property
    def least(self) -> int:
        """``size`` sites for each of the groups that the rule needs."""
        return self.size * int(self.rule.least)

    def check(self, layout: Layout, phase: Phase) -> None:
        """As the rule over the groups."""
        self.rule.check(layout, phase)

    def groups(self, count: int, seed: int) -> tuple[tuple[int, ...], ...]:
        """``count`` sites dealt into groups of ``size`` or a little more, by the round's public ``seed``."""
        order = np.random.default_rng(seed).permutation(count)
        return tuple(tuple(map(int, places)) for places in np.array_split(order, max(count // self.size, 1)))

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase, seed: int = 0) -> Tensors:
        """As `combine_sums` on groups dealt by ``seed``; needs the parts in the clear."""
        admit(self, current, parts, phase)
        dealt = [[parts[place] for place in places] for places in self.groups(len(parts), seed)]
        return self._over([Part(float(clamped(group).sum()), blend(group, shares(group))) for group in dealt], current, phase)

    def combine_sums(self, current: Tensors, sums: Sequence[Update], phase: Phase, least: int = 0) -> Tensors:
        """Combine the groups' sums; of single sites nothing is needed.

        A sum is over ``least`` sites or more (0: over ``size``), which is fewer than were dealt where some vanished.

        Raises:
            CohortError: too few groups for the rule.
            UpdateError: a sum is over too few sites, or as the rule over the groups.
        """
        needed = least or self.size
        for place, total in enumerate(sums):
            if total.count < needed:
                raise UpdateError(f"buckets: group {place} is a sum over {total.count} sites, at least {needed} must hide in it")
        return self._over([Part(total.weight, total.mean()) for total in sums], current, phase)

    def _over(self, groups: list[Part], current: Tensors, phase: Phase) -> Tensors:
        most = max((group.weight for group in groups), default=1.0)
        result: Tensors = self.rule.combine(current, [Part(group.weight / most, group.values) for group in groups], phase)
        return result
