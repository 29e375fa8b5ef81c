"""From the sites' updates to the mean that moves an adapter: the sum, the scheme's own gathering, or a robust rule."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.errors import UpdateError
from fedpeft.schemes import Gathers, Part, Reports
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Update
from fedpeft_coordinator.planning import phase_of
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import TaskRound


def up_layout(setup: Setup, row: TaskRound) -> Layout:
    """The layout of what a site sends for ``row``."""
    return setup.scheme.travels(setup.tasks[row.task].layout, phase_of(row))


def mean_layout(setup: Setup, row: TaskRound) -> Layout:
    """The layout of what `average` gives: that of the sites' parts, unless the scheme makes something else of them."""
    if isinstance(setup.scheme, Gathers):
        return setup.tasks[row.task].layout.subset(row.moves)
    return up_layout(setup, row)


def average(setup: Setup, row: TaskRound, current: Tensors, total: Update, parts: Sequence[Part]) -> Tensors:
    """The mean that `Scheme.advance` takes; ``parts`` in a fixed order, where they were kept (`Setup.keeps_parts`).

    Raises:
        UpdateError: the rule cannot work with these parts: too few of them, not finite, or of another layout.
    """
    scheme, phase = setup.scheme, phase_of(row)
    if isinstance(scheme, Gathers):
        mean = scheme.gather(current, parts, phase)
    elif setup.combine is not None:
        mean = setup.combine.combine(current, parts, phase)
    else:
        mean = total.mean()
    if mean.layout != mean_layout(setup, row) or not mean.finite:
        raise UpdateError(f"task {row.task}: the mean of {total.count} sites is not finite or of another layout; look for a diverging site")
    return mean


def drift(setup: Setup, row: TaskRound, current: Tensors, mean: Tensors) -> dict[str, float]:
    """What averaging lost, by the scheme's own account; empty where it gives none."""
    scheme = setup.scheme
    found = scheme.drift(current, mean, phase_of(row)) if isinstance(scheme, Reports) else {}
    return {name: float(value) for name, value in found.items()}
