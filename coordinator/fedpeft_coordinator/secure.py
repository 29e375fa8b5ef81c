"""The coordinator's half of masked sums over real rounds: keys, shares, vectors, survivors, and what comes out.

Between the vectors and the survivors the round is in the journal as ``sealed``: sites sign one set of survivors for ever, so a
coordinator that is started again asks for the same. Anything before that is done anew under another nonce.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.privacy.packing import Schema
from fedpeft.privacy.secagg import Collector
from fedpeft.tensors import Layout
from fedpeft.update import Counters, Grid, Update, train_counters
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskPlan
from fedpeft.wire.vector import Vector
from fedpeft_coordinator import planning
from fedpeft_coordinator.exchange import Around, Exchange, by_site
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.masked import Group, Sums
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.scaling import Scaling
from fedpeft_coordinator.setup import SecureAggregation, Setup
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.updates import groups, sent_layout

Sites = Callable[[Collector], Iterable[str]]
NOTE = "identities"


@dataclass
class Secure:
    """Gathers masked sums for rounds; site's identities are believed as first seen and kept in ``journal``."""

    setup: Setup
    settings: SecureAggregation
    run: str
    journal: Journal
    scaling: Scaling
    around: Around
    _scored: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)

    def seal(self, plan: Round, writer: Writer) -> Round:
        """Train under masks: the round at ``sealed``, or at ``combined`` when not one sum can be opened. Raises `LinkError`."""
        sums = self._begin("train", plan, {name: groups(self.setup, plan.tasks[name]) for name in plan.asked}, writer)
        sums.vectors = {name: self._vector(plan.tasks[name]) for name in plan.asked}
        self._say("keys", plan, sums, lambda one: one.instance.members)
        self._shares(plan, sums)
        self._vectors("train", plan, sums, writer)
        rows = {name: self._sealed(plan.tasks[name], sums) for name in plan.asked}
        return plan.at("sealed" if any(row.sealed for row in rows.values()) else "combined", **rows)

    def open(self, sealed: Round) -> Sums:
        """The sums of a sealed round, for `Sums.results`. Raises `LinkError`."""
        rows = [row for row in sealed.tasks.values() if row.sealed]
        sums = Sums({group: one for row in rows for group, one in self._collectors(row).items()}, self._identities())
        sums.vectors = {row.task: self._vector(row) for row in rows}
        self._agree(sealed, sums)
        return sums

    def score(self, done: Round, able: Mapping[str, tuple[str, ...]], writer: Writer) -> dict[str, Counters]:
        """Counters of held-out rows, per task whose masked sum could be opened. Raises `LinkError`.

        Where sites scored the round before, they alone are asked: they sign sums of it over the same sites only.
        """
        return {name: total.counters for name, total in self.totals(done, able, writer).items()}

    def totals(self, done: Round, able: Mapping[str, tuple[str, ...]], writer: Writer) -> dict[str, Update]:
        """As `score`, the sums themselves: where they are noised, counters are in their vectors. Raises `LinkError`."""
        sums = self._begin("evaluate", done, {name: [self._scored.get((done.number, name), able[name])] for name in able}, writer)
        self._ask("evaluate", done, sums, lambda one: one.instance.members, ("keys", writer))
        sums.vectors = {name: self._counted(done.tasks[name], one, sums.counters[name]) for (name, _), one in sums.collectors.items()}
        self._shares(done, sums)
        self._vectors("evaluate", done, sums, writer)
        self._agree(done, sums)
        found = sums.results()
        self._scored |= {(done.number, name): sums.collectors[name, 0].survivors for name in found}
        if sums.lost:
            self.around.events("unscored", round=done.number, tasks=sums.lost)
        return {name: total for name, (total,) in found.items()}

    # exchanges -------------------------------------------------------------------------------------------------------------

    def _begin(self, kind: str, plan: Round, cohorts: Mapping[str, Sequence[tuple[str, ...]]], writer: Writer) -> Sums:
        """A machine for each group of sites in ``cohorts``."""
        sums = Sums({}, self._identities(), {name: self.setup.tasks[name].lengths for name in cohorts})
        for name, parted in cohorts.items():
            least = self.settings.least if len(parted) == 1 else self.settings.grouped
            purpose = writer.purpose(kind, plan, name)
            for place, members in enumerate(parted):
                fresh = f"{purpose}#{secrets.token_hex(16)}"
                sums.collectors[name, place] = Collector(self.settings.instance(fresh, members, least))
        sums.require(lambda one: one.instance.shape.sites, "can be asked")
        return sums

    def _shares(self, plan: Round, sums: Sums) -> None:
        self.journal.note(NOTE, dict(sums.identities))
        sums.require(lambda one: len(one.bundles), "published keys")
        self._say("shares", plan, sums, lambda one: one.bundles)
        sums.require(lambda one: len(one.boxes), "dealt shares")

    def _vectors(self, kind: str, plan: Round, sums: Sums, writer: Writer) -> None:
        self._ask(kind, plan, sums, lambda one: one.dealers, ("vector", writer))
        sums.require(lambda one: len(one.delivered), "delivered")

    def _agree(self, plan: Round, sums: Sums) -> None:
        self._say("agree", plan, sums, lambda one: one.survivors)
        self._say("reveal", plan, sums, lambda one: one.signatures)

    def _say(self, step: str, plan: Round, sums: Sums, sites: Sites) -> None:
        """A short exchange of its own."""

        def write(site: str, tasks: tuple[str, ...], _whole: bool) -> Envelope:
            rows = [TaskPlan(task=name, masking=sums.say(step, site, name)) for name in tasks]
            return Envelope.of("secure", RoundPlan(federation=self.setup.name, run=self.run, round=plan.number, tasks=rows))

        limits = replace(self.setup.limits, deadline=min(self.setup.limits.deadline, self.settings.deadline))
        sums.note(Exchange(step, plan, write, sums.takers[step], limits).run(by_site(sums.asked(sites)), self.around))

    def _ask(self, kind: str, plan: Round, sums: Sums, sites: Sites, what: tuple[str, Writer]) -> None:
        """A step beside the work that it is for."""
        step, writer = what
        told = replace(writer, masking=partial(sums.say, step))
        ask = told.train if kind == "train" else told.evaluate

        def write(site: str, tasks: tuple[str, ...], whole: bool) -> Envelope:
            return ask(plan, self.around.roster.sites[site], tasks, whole)

        sums.note(Exchange(kind, plan, write, sums.takers[step], self.setup.limits).run(by_site(sums.asked(sites)), self.around))

    # what is kept ----------------------------------------------------------------------------------------------------------

    def _sealed(self, row: TaskRound, sums: Sums) -> TaskRound:
        """``row`` with its masked sums in the store, or skipped when too few sites are in them."""
        drops, kept = sums.drops.get(row.task, {}), sums.of(row.task)
        if not kept:
            return planning.skipped(replace(row, drops=dict(sorted(drops.items()))), sums.lost[row.task])
        row = replace(row, drops=dict(sorted({**sums.left_out(row.task), **drops}.items())))
        count, least = sum(len(one.delivered) for one in kept.values()), self.setup.limits.min_sites
        if count < least:
            return planning.skipped(row, f"{count} of {len(row.cohort)} site(s) contributed, cohort.min_sites = {least}")
        arrays: dict[str, NDArray[Any]] = {}
        for (_, place), one in kept.items():
            assert one.total is not None
            arrays |= {f"total {place}": one.total, f"collector {place}": np.frombuffer(one.to_bytes(), np.uint8)}
        return replace(row, sealed=self.scaling.store.put_arrays(arrays))

    def _collectors(self, row: TaskRound) -> dict[Group, Collector]:
        arrays = self.scaling.store.arrays(row.sealed)
        places = sorted(int(name.split()[1]) for name in arrays if name.startswith("total"))
        return {
            (row.task, place): Collector.from_bytes(arrays[f"collector {place}"].tobytes(), arrays[f"total {place}"]) for place in places
        }

    def _vector(self, row: TaskRound) -> Vector:
        counters = {} if row.privacy else train_counters(self.setup.task_blind)
        schema = Schema(sent_layout(self.setup, row), planning.grid_of(row, self.setup.limits), counters)
        return Vector(schema, self.scaling.lanes(row))

    @staticmethod
    def _counted(row: TaskRound, collector: Collector, counters: Mapping[str, int]) -> Vector:
        """What an evaluation's vector holds."""
        if row.privacy:
            mechanism = planning.mechanism_of(row)
            return Vector(Schema(mechanism.layout(Layout(())), mechanism.grid, {}))
        return Vector(Schema(Layout(()), Grid(len(collector.instance.members)), counters))

    def _identities(self) -> dict[str, str]:
        return {**self.journal.notes().get(NOTE, {}), **self.settings.identities}
