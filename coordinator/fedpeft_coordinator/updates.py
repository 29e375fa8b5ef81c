"""What a training exchange gathers of each task: a running sum, sums of groups, or every site's part, as the rules need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from fedpeft.errors import UpdateError
from fedpeft.schemes import Part, Sum
from fedpeft.schemes.robust import Buckets
from fedpeft.tensors import Layout
from fedpeft.update import Grid, Update
from fedpeft.wire import Envelope
from fedpeft.wire.codecs import DeltaCodec, Lanes
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_coordinator.collecting import decode
from fedpeft_coordinator.planning import codec_of, grid_of, mechanism_of, phase_of
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import Round, TaskRound


def up_layout(setup: Setup, row: TaskRound) -> Layout:
    """The layout of what a site contributes to ``row``."""
    return setup.scheme.travels(setup.tasks[row.task].layout, phase_of(row))


def sent_layout(setup: Setup, row: TaskRound) -> Layout:
    """The layout of what a site sends for ``row``: under noise, what travels beside its delta is in one vector with it."""
    return mechanism_of(row).layout(up_layout(setup, row)) if row.privacy else up_layout(setup, row)


def check_uniform(update: Update) -> None:
    """Raise `UpdateError` unless a site's protected ``update`` weighs as much as any other's and has nothing beside its vector."""
    if update.weight != 1 or update.counters:
        raise UpdateError(
            f"update: weight {update.weight:g} and counters {sorted(update.counters)} beside a protected vector; under privacy every site "
            "weighs 1 and counters are inside"
        )


class Gathered(Protocol):
    """What a mean is made of: the sum over all sites, sums of groups of them, parts by site where they were kept."""

    @property
    def total(self) -> Update:
        """The sum over all sites."""
        ...

    @property
    def sums(self) -> list[Update]:
        """The sum of each group; one where there are no groups."""
        ...

    @property
    def parts(self) -> dict[str, Part]:
        """The sites' parts by name of site in its order; empty where only sums are needed."""
        ...


@dataclass(frozen=True)
class Expectation:
    """What the vectors of one evaluation must look like."""

    layout: Layout
    grid: Grid
    codec: DeltaCodec | None = None
    lanes: Lanes | None = None


@dataclass(frozen=True)
class Opened:
    """Sums that came out of their masks, one for each group of sites: all that the coordinator ever sees of them."""

    sums: list[Update]

    @property
    def total(self) -> Update:
        """The sum over all sites."""
        return reduce(add, self.sums)

    @property
    def parts(self) -> dict[str, Part]:
        """None."""
        return {}


class TaskUpdates:
    """The updates of one task: one vector of codes whatever the number of sites, or one per group of sites.

    Where the scheme or the combine rule needs them, every site's part as well: memory then grows with the cohort.
    """

    def __init__(self, setup: Setup, row: TaskRound, lanes: Lanes | None = None) -> None:
        self.layout, self.grid = sent_layout(setup, row), grid_of(row, setup.limits)
        self._uniform = bool(row.privacy)
        self.codec = codec_of(self.layout.size, self.grid.sites, setup.limits)
        self.lanes = None if lanes is None else lanes.alone
        parted = groups(setup, row)
        self._group = {site: place for place, sites in enumerate(parted) for site in sites}
        self._sums = [Sum(self.layout, self.grid) for _ in parted]
        self._parts: dict[str, Part] | None = {} if setup.keeps_parts else None

    def add(self, site: str, update: Update) -> None:
        """Take one site's update in. Raises `UpdateError` when it is of another layout or grid, not finite or out of range."""
        if self._uniform:
            check_uniform(update)
        self._sums[self._group[site]].add(update)
        if self._parts is not None:
            self._parts[site] = Part(update.weight, update.mean())

    @property
    def total(self) -> Update:
        """The sum over all sites."""
        return reduce(add, self.sums)

    @property
    def sums(self) -> list[Update]:
        """The sum of each group; one where there are no groups."""
        return [one.result() for one in self._sums]

    @property
    def parts(self) -> dict[str, Part]:
        """The sites' parts by name of site in its order, whatever the order of arrival; empty where only sums are needed."""
        return dict(sorted((self._parts or {}).items()))


class Protected:
    """The noised sums of an evaluation, by task: counters are all that there is in their vectors."""

    def __init__(self, plan: Round, tasks: Iterable[str]) -> None:
        mechanisms = {name: mechanism_of(plan.tasks[name]) for name in tasks}
        self.expected = {name: Expectation(one.layout(Layout(())), one.grid) for name, one in mechanisms.items()}
        self._sums = {name: Sum(one.layout, one.grid) for name, one in self.expected.items()}

    def accept(self, _site: str, result: TaskResult, envelope: Envelope) -> None:
        """Add one site's vector. Raises `UpdateError` when it is of another layout or grid, or out of range."""
        update = decode(result, envelope, self.expected[result.task])
        check_uniform(update)
        self._sums[result.task].add(update)

    @property
    def totals(self) -> dict[str, Update]:
        """The sums so far."""
        return {name: one.result() for name, one in self._sums.items()}


class Updates:
    """The updates of every task of a round."""

    def __init__(self, plan: Round, setup: Setup, lanes: Callable[[TaskRound], Lanes | None] = lambda _row: None) -> None:
        self.tasks = {name: TaskUpdates(setup, plan.tasks[name], lanes(plan.tasks[name])) for name in plan.asked}

    def accept(self, site: str, result: TaskResult, envelope: Envelope) -> None:
        """Add one site's update. Raises `UpdateError` when it is of another layout or grid, not finite or out of range."""
        task = self.tasks[result.task]
        task.add(site, decode(result, envelope, task))


def groups(setup: Setup, row: TaskRound) -> list[tuple[str, ...]]:
    """The cohort in the groups that the rule wants, dealt by the round's seed; all in one where it wants none."""
    if not isinstance(setup.combine, Buckets):
        return [row.cohort]
    return [tuple(row.cohort[place] for place in places) for places in setup.combine.groups(len(row.cohort), row.seed)]
