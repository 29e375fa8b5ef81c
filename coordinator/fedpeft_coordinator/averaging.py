"""From the updates of a task to the mean that moves its adapter: the sum, the scheme's own gathering, or a robust rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.errors import CohortError, UpdateError
from fedpeft.schemes import Gathers, Reports
from fedpeft.schemes.robust import Buckets, CombineRule, Rooted
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Counters, Update
from fedpeft_coordinator.planning import phase_of
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import TaskRound
from fedpeft_coordinator.updates import Gathered, up_layout


@dataclass(frozen=True)
class Averaged:
    """What is kept of a task's updates: the mean, its weight, counters, the share of sites inside the clip (None: unknown)."""

    mean: Tensors
    weight: float
    counters: Counters
    inside: float | None = None


def mean_layout(setup: Setup, row: TaskRound) -> Layout:
    """The layout of what `average` gives: that of the sites' parts, unless the scheme makes something else of them."""
    if isinstance(setup.scheme, Gathers):
        return setup.tasks[row.task].layout.subset(row.moves)
    return up_layout(setup, row)


def contributors(setup: Setup, total: Update) -> int:
    """Sites whose values are in ``total``; where holdings are hidden, those that hold the task."""
    return round(total.counters["train.holders"][0]) if setup.task_blind else total.count


def average(setup: Setup, row: TaskRound, current: Tensors, updates: Gathered) -> Tensors:
    """The mean that `Scheme.advance` takes.

    Raises:
        UpdateError: the rule cannot work with what came: too few parts, or of another layout.
    """
    try:
        mean = _mean(setup, row, current, updates)
    except CohortError as fault:
        raise UpdateError(str(fault)) from None
    if mean.layout != mean_layout(setup, row):
        raise UpdateError(f"task {row.task}: what was made of the parts has roles {sorted(mean.layout.roles)}; do scheme and rule fit?")
    return mean


def drift(setup: Setup, row: TaskRound, current: Tensors, mean: Tensors) -> dict[str, float]:
    """What averaging lost, by the scheme's own account; empty where it gives none."""
    scheme = setup.scheme
    found = scheme.drift(current, mean, phase_of(row)) if isinstance(scheme, Reports) else {}
    return {name: float(value) for name, value in found.items()}


def _mean(setup: Setup, row: TaskRound, current: Tensors, updates: Gathered) -> Tensors:
    scheme, phase, rule = setup.scheme, phase_of(row), setup.combine
    if isinstance(scheme, Gathers):
        return scheme.gather(current, list(updates.parts.values()), phase)
    if isinstance(rule, Buckets):
        if setup.secure is None:
            return rule.combine_sums(current, joined(updates.sums, rule.size), phase)
        return rule.combine_sums(current, updates.sums, phase, setup.secure.grouped)
    if rule is not None:
        return _robust(rule, setup.limits.root, row, current, updates)
    return updates.total.mean()


def _robust(rule: CombineRule, root: str, row: TaskRound, current: Tensors, updates: Gathered) -> Tensors:
    parts, phase = updates.parts, phase_of(row)
    if not isinstance(rule, Rooted):
        return rule.combine(current, list(parts.values()), phase)
    if root not in parts:
        raise UpdateError(f"{rule.kind}: site {root!r} (cohort.root) did not contribute; without it nothing can be trusted")
    trusted = parts.pop(root)
    return rule.combine_rooted(current, list(parts.values()), phase, trusted.values)


def joined(sums: Sequence[Update], size: int) -> list[Update]:
    """``sums`` with neighbours added up until ``size`` sites are in each; what is short at the end joins the last."""
    out: list[Update] = []
    for total in sums:
        if out and out[-1].count < size:
            out[-1] = out[-1] + total
        else:
            out.append(total)
    if len(out) > 1 and out[-1].count < size:
        last = out.pop()
        out[-1] = out[-1] + last
    return out
