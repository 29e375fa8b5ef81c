"""Lengths, angles and distances of the sites' parts in the space in which they act.

LoRA's factors are fixed only up to ``(B R, R^-1 A)``, so parts are measured by what they change in the product:

- both factors travel: the Frobenius norm of ``(B + dB)(A + dA) - B A``, a product of rank 2r that stays in factors;
- one factor travels: ``||dB||_A = ||dB A||``. With ``A A' = L L'`` that is the Euclidean norm of ``dB L``;
- one of LoRA-XS's three travels, ``||B dR A||`` for its core: in the same way, from both sides;
- every other role: the Euclidean norm. (A bottleneck's halves have a nonlinearity between them and no product; a factor whose
  partner each site keeps to itself has no product that the coordinator could know; several B on one A, and convolutions, do not pair.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft import factors
from fedpeft.errors import AdapterError, UpdateError
from fedpeft.factors import Matrix, Pair
from fedpeft.schemes.base import Phase
from fedpeft.schemes.robust.moving import Table, growth_of_changes, inner_changes
from fedpeft.tensors import Layout, Tensors

CORE = frozenset("ABR")
FACTORS = (("B", "A"), ("B2", "A2"))
COLUMNS = 1 << 15
"""Columns of one block: fifty parts of it stay in the third-level cache."""
CLOSE = 0.05
"""Below this share of the lengths, a distance from float32 inner products has lost more than a digit and is taken in float64."""

Named = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Lift:
    """A travelling factor between frozen ones: the Euclidean norm of ``left x right`` is that of the product's change."""

    name: str
    left: Matrix | None = None
    right: Matrix | None = None

    def rows(self, parts: Sequence[Named], dtype: type[np.floating[Any]]) -> Table:
        """One row of lifted values per part, (n, k)."""
        stacked: Table = np.stack([part[self.name] for part in parts]).astype(dtype, copy=False)
        stacked = stacked if self.left is None else self.left.astype(dtype) @ stacked
        stacked = stacked if self.right is None else stacked @ self.right.astype(dtype)
        return stacked.reshape(len(parts), -1)


@dataclass(frozen=True)
class Metric:
    """How parts of one phase are measured: modules whose two factors move, lifted factors, and the roles taken as they are."""

    pairs: tuple[Pair, ...]
    lifts: tuple[Lift, ...]
    plain: frozenset[str]
    before: Named

    def moving(self, pair: Pair, parts: Sequence[Named], dtype: type[np.floating[Any]]) -> tuple[Table, Table, Table, Table]:
        """B, A, and all parts' dB and dA of ``pair``."""
        before = [self.before[name].astype(dtype, copy=False) for name in (pair.b, pair.a)]
        after = [np.stack([part[name] for part in parts]).astype(dtype, copy=False) for name in (pair.b, pair.a)]
        return before[0], before[1], after[0], after[1]


def check_metric(kind: str, layout: Layout, phase: Phase) -> None:
    """Raise `UpdateError` where two of three factors that multiply would have to be measured at once."""
    moved = sorted(layout.roles & phase.roles & CORE)
    if layout.roles >= CORE and len(moved) > 1:
        raise UpdateError(
            f"{kind}: phase {phase.name!r} moves {moved} of LoRA-XS's three factors at once, and such a product is not measured; "
            "use scheme fedsb, which moves one at a time"
        )


def metric(current: Tensors, phase: Phase) -> Metric:
    """The metric of ``phase`` at ``current``; factors that do not pair one to one as matrices are measured as they are."""
    layout, named = current.layout, current.named()
    moved = layout.roles & phase.roles
    if layout.roles >= CORE:
        return Metric((), tuple(_cores(layout, named, moved)), moved - CORE, named)
    plain, moving = moved, list[Pair]()
    lifts = list[Lift]()
    for roles in FACTORS:
        if not set(roles) <= layout.roles - phase.private or not moved & set(roles):
            continue
        try:
            found = factors.pairs(layout, roles)
        except AdapterError:
            continue
        plain -= set(roles)
        if set(roles) <= moved:
            moving += found
        else:
            lifts += [_lift(pair, named, roles[0] in moved) for pair in found]
    return Metric(tuple(moving), tuple(lifts), plain, named)


def gram(measure: Metric, parts: Sequence[Tensors], dtype: type[np.floating[Any]] = np.float32) -> Matrix:
    """Inner products (n, n) of ``parts``, taken in ``dtype``; symmetric bit for bit.

    Raises:
        UpdateError: a part is not finite, or so large that its square is not.
    """
    named = [part.named() for part in parts] if measure.pairs or measure.lifts else []
    total = np.zeros((len(parts), len(parts)))
    with np.errstate(over="ignore", invalid="ignore"):
        for pair in measure.pairs:
            total += inner_changes(*measure.moving(pair, named, dtype))
        for lift in measure.lifts:
            rows = lift.rows(named, dtype)
            total += rows @ rows.T
        for block in _blocks(parts, measure.plain, dtype):
            total += block @ block.T
    _check_finite(np.diagonal(total))
    return np.asarray((total + total.T) / 2.0)


def distances(measure: Metric, parts: Sequence[Tensors]) -> Matrix:
    """Squared distances (n, n) between ``parts``; where some are close, all inner products are taken again in float64."""
    table = gram(measure, parts)
    squared = _apart(table)
    lengths = np.diagonal(table)
    sums = lengths[:, None] + lengths[None, :]
    if len(parts) > 1 and (squared < CLOSE * sums)[~np.eye(len(parts), dtype=bool)].any():
        squared = _apart(gram(measure, parts, np.float64))
    return squared


def growth(measure: Metric, parts: Sequence[Tensors]) -> Matrix:
    """Coefficients (n, 3) of ``||s x||^2 = c0 s^2 + c1 s^3 + c2 s^4``: with two moving factors a product is not linear in s.

    Raises:
        UpdateError: a part is not finite.
    """
    named = [part.named() for part in parts] if measure.pairs else []
    still = Metric((), measure.lifts, measure.plain, measure.before)
    table = np.zeros((len(parts), 3))
    table[:, 0] = np.diagonal(gram(still, parts, np.float64))
    for pair in measure.pairs:
        table += growth_of_changes(*measure.moving(pair, named, np.float64))
    _check_finite(table.sum(axis=1))
    return table


def resize(coefficients: NDArray[np.float64], length: float) -> float:
    """The ``s`` at which ``||s x||`` is ``length``, from a row of `growth`; never longer, up to 2^-50. 1 for a part of length 0."""

    def size(s: float) -> float:
        return float(coefficients @ np.array([s**2, s**3, s**4]))

    if size(1.0) <= 0.0:
        return 1.0
    low, high = 0.0, 1.0
    while size(high) < length**2:
        low, high = high, 2.0 * high
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if size(middle) <= length**2 else (low, middle)
    return low


def _check_finite(lengths: Matrix) -> None:
    for place in np.flatnonzero(~np.isfinite(lengths)):
        raise UpdateError(f"combine: part {place} is not finite or beyond all measure; drop that site and combine the others")


def _apart(table: Matrix) -> Matrix:
    lengths = np.diagonal(table)
    squared = np.maximum(lengths[:, None] + lengths[None, :] - 2.0 * table, 0.0)
    np.fill_diagonal(squared, 0.0)
    return np.asarray(squared)


def _lift(pair: Pair, named: Named, left_moves: bool) -> Lift:
    if left_moves:
        return Lift(pair.b, right=_root(named[pair.a]))
    return Lift(pair.a, left=_root(named[pair.b].T).T)


def _cores(layout: Layout, named: Named, moved: frozenset[str]) -> Iterator[Lift]:
    """The one of B, R and A that moves, between what stands left and right of it."""
    for outer, inner in zip(factors.pairs(layout, ("B", "R")), factors.pairs(layout, ("R", "A")), strict=True):
        b, r, a = (named[name].astype(np.float64) for name in (outer.b, inner.b, inner.a))
        if "B" in moved:
            yield Lift(outer.b, right=_root(r @ a))
        if "R" in moved:
            yield Lift(inner.b, _root(b.T).T, _root(a))
        if "A" in moved:
            yield Lift(inner.a, left=_root((b @ r).T).T)


def _root(a: Table) -> Matrix:
    """``L`` (r, r) with ``L L' = a a'``, for ``a`` of any rank."""
    wide = a.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _blocks(parts: Sequence[Tensors], roles: frozenset[str], dtype: type[np.floating[Any]]) -> Iterator[Table]:
    """Blocks (n, k) of the values of ``roles``; the buffer is used again for each."""
    spans = [span for role, span in sorted(parts[0].layout.role_spans.items()) if role in roles]
    widest = max((min(span.stop - span.start, COLUMNS) for span in spans), default=0)
    buffer = np.empty((len(parts), widest), dtype)
    for span in spans:
        for start in range(span.start, span.stop, COLUMNS):
            stop = min(start + COLUMNS, span.stop)
            for row, part in zip(buffer, parts, strict=True):
                row[: stop - start] = part.flat[start:stop]
            yield buffer[:, : stop - start]
