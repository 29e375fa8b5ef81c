"""Averaging in coordinates in which a method is linear: RoAd's angles and scales as points of the plane (RoAd: arXiv 2409.00119)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpeft.errors import UpdateError
from fedpeft.schemes.base import Phase, SiteContext, check_round, difference, linear, move
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.tensors import Flat, Layout, Tensors

Values = tuple[Flat, ...]


@dataclass(frozen=True)
class Coordinates:
    """A change of coordinates over ``roles`` of equal shapes: ``there`` to the linear ones, ``back`` to the values nearest to ``now``."""

    roles: tuple[str, ...]
    there: Callable[[Values], Values]
    back: Callable[[Values, Values], Values]


def _to_plane(values: Values) -> Values:
    alpha, theta = (value.astype(np.float64) for value in values)
    return (alpha * np.cos(theta)).astype(np.float32), (alpha * np.sin(theta)).astype(np.float32)


def _to_polar(values: Values, now: Values) -> Values:
    """The scale keeps its sign, and the angle its number of turns."""
    x, y = (value.astype(np.float64) for value in values)
    side = np.where(now[0] < 0, -1.0, 1.0)
    theta = np.arctan2(side * y, side * x)
    theta += 2.0 * np.pi * np.round((now[1] - theta) / (2.0 * np.pi))
    return (side * np.hypot(x, y)).astype(np.float32), theta.astype(np.float32)


CHARTS: tuple[Coordinates, ...] = (Coordinates(("alpha", "theta"), _to_plane, _to_polar),)
"""RoAd rotates and scales pairs of outputs: its weights are linear in (alpha cos theta, alpha sin theta), in all three variants."""


@dataclass(frozen=True)
class Cartesian:
    """All roles move, those of a chart of `CHARTS` in its linear coordinates: the site sends deltas there, the coordinator turns back.

    What travels has the roles and shapes of the adapter, with other values: (alpha, theta) carry (x, y).
    """

    kind: ClassVar[str] = "cartesian"
    sum_only: ClassVar[bool] = True

    def check(self, layout: Layout) -> None:
        """A method of some chart is needed."""
        if not _charts(layout):
            known = [list(chart.roles) for chart in CHARTS]
            raise UpdateError(
                f"scheme cartesian: needs tensors of roles {known}, this adapter has {sorted(layout.roles)}; "
                'set method.kind = "road", or scheme.kind = "fedavg"'
            )

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """True unless roles outside the charts multiply."""
        return linear(layout.roles - {role for chart in _charts(layout) for role in chart.roles})

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round."""
        check_round(round)
        return Phase("all", layout.roles)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles."""
        return layout.subset(phase.roles)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything, in linear coordinates."""
        return difference(_linear(before), _linear(after), phase)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move in linear coordinates and turn back; coordinates that did not move keep their bits."""
        start = _linear(current)
        moved, state = move(start, mean, phase, optimizer, state)
        out = Tensors(moved.layout, moved.flat.copy())
        for chart in _charts(current.layout):
            spans = [current.layout.role_spans[role] for role in chart.roles]
            still = np.logical_and.reduce([moved.flat[span] == start.flat[span] for span in spans])
            back = chart.back(tuple(moved.flat[span] for span in spans), tuple(current.flat[span] for span in spans))
            for span, value in zip(spans, back, strict=True):
                out.flat[span] = np.where(still, current.flat[span], value)
        return out, state


def _linear(tensors: Tensors) -> Tensors:
    out = Tensors(tensors.layout, tensors.flat.copy())
    for chart in _charts(tensors.layout):
        spans = [tensors.layout.role_spans[role] for role in chart.roles]
        for span, value in zip(spans, chart.there(tuple(tensors.flat[span] for span in spans)), strict=True):
            out.flat[span] = value
    return out


def _charts(layout: Layout) -> list[Coordinates]:
    """The charts whose roles ``layout`` holds in equal shapes, module by module."""
    shapes = {role: [entry.shape for entry in layout.entries if entry.role == role] for role in layout.roles}
    return [c for c in CHARTS if set(c.roles) <= layout.roles and len({tuple(shapes[role]) for role in c.roles}) == 1]
