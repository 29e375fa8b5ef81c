"""What a combine rule is, who may take part, and the weighted sum that most of them end in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import CohortError, UpdateError
from fedpeft.schemes.base import MULTIPLY, Part, Phase
from fedpeft.tensors import Flat, Layout, Tensors
from fedpeft.update import BLOCK

Shares = NDArray[np.float64]
CAP = 2.0
"""No part weighs more than this many times the median weight: example counts are self-reported."""


class CombineRule(Protocol):
    """How the sites' parts become one delta where some sites may lie.

    ``sum_only``: the rule needs sums over groups of sites and no single part, so secure aggregation may run inside each group.
    ``against``: the liars that it holds against. ``cost``: how its time grows with ``n`` parts of ``d`` values; the mean's is ``n d``.
    """

    kind: ClassVar[str]
    sum_only: ClassVar[bool]
    against: ClassVar[str]
    cost: ClassVar[str]

    @property
    def least(self) -> int:
        """The fewest parts that the rule can work with."""
        ...

    def check(self, layout: Layout, phase: Phase) -> None:
        """Raise `UpdateError`, with the setting to change, where the rule has no meaning for ``phase`` of an adapter of ``layout``."""
        ...

    def combine(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """One delta of the parts' layout that stands in for their mean; ``current`` is the adapter before the round.

        Raises:
            CohortError: fewer than `least` parts.
            UpdateError: `check` fails, or a part is not finite, of another layout or of no weight.
        """
        ...


def admit(rule: CombineRule, current: Tensors, parts: Sequence[Part], phase: Phase) -> None:
    """Raise unless ``rule`` may combine ``parts``, as `CombineRule.combine` says."""
    rule.check(current.layout, phase)
    if len(parts) < rule.least:
        raise CohortError(
            f"{rule.kind}: {len(parts)} parts came, this setting needs at least {rule.least}; ask more sites or assume fewer liars"
        )
    for place, part in enumerate(parts):
        if part.values.layout != parts[0].values.layout:
            raise UpdateError(f"{rule.kind}: parts 0 and {place} are of different layouts; were they sent in one round?")
        if not part.weight > 0.0 or not np.isfinite(part.weight):
            raise UpdateError(f"{rule.kind}: part {place} weighs {part.weight}; a weight is a positive number")


def refuse_products(kind: str, layout: Layout, phase: Phase) -> None:
    """Raise `UpdateError` where two roles that multiply move together: a rule per coordinate would take B and A from different sites."""
    moved = layout.roles & phase.roles
    for pair in MULTIPLY:
        if len(pair) > 1 and pair <= moved:
            raise UpdateError(
                f"{kind}: roles {sorted(pair)} multiply and move in one round, and coordinates taken one by one make a product of no "
                "site; use a scheme that moves one at a time (alternating, ffa), or combine krum, multikrum or rfa"
            )


def clamped(parts: Sequence[Part]) -> Shares:
    """The parts' weights (n,), none above `CAP` times their median."""
    weights = np.array([part.weight for part in parts])
    return np.asarray(np.minimum(weights, CAP * np.median(weights)))


def shares(parts: Sequence[Part]) -> Shares:
    """The clamped weights over their sum."""
    weights = clamped(parts)
    return np.asarray(weights / weights.sum())


def blend(parts: Sequence[Part], weights: Sequence[float] | NDArray[Any]) -> Tensors:
    """The sum of ``weights[i]`` times part i, added in float64 block by block; parts of weight 0 are not read."""
    used = [(float(weight), part.values.flat) for weight, part in zip(weights, parts, strict=True) if weight]
    out = np.empty(parts[0].values.layout.size, np.float32)
    for start in range(0, out.size, BLOCK):
        out[start : start + BLOCK] = _block(used, slice(start, start + BLOCK), out[start : start + BLOCK].size)
    return Tensors(parts[0].values.layout, out)


def mean(parts: Sequence[Part], places: Sequence[int]) -> Tensors:
    """The unweighted mean of the parts at ``places``."""
    weights = np.zeros(len(parts))
    weights[list(places)] = 1.0 / len(places)
    return blend(parts, weights)


def _block(used: list[tuple[float, Flat]], span: slice, size: int) -> Shares:
    total, scratch = np.zeros(size), np.empty(size)
    for weight, flat in used:
        np.add(total, np.multiply(flat[span], weight, out=scratch, dtype=np.float64), out=total)
    return total
