"""The Round: a state machine whose every step is in the journal before the next begins.

planned (cohort, seeds, phase, start) -> collecting -> sealed (where sums are masked) -> combined (mean) -> committed (new adapter)
-> scored -> gated (where routers want gates) -> published. Whatever kills the process, `Coordinator.run` goes on from the last step, and
the final adapters are the same bits: plans are pure functions of journal and setup, sums are exact in any order, and each step replaces
the one before.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedpeft.errors import CohortError, ConfigError, PrivacyError, UpdateError
from fedpeft.tensors import Tensors
from fedpeft_coordinator import averaging, choosing, gathering, gating, planning, sharing
from fedpeft_coordinator.advancing import Advance
from fedpeft_coordinator.averaging import Averaged
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.exchange import Around
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.planning import Known
from fedpeft_coordinator.privacy import private_of
from fedpeft_coordinator.rating import Rater
from fedpeft_coordinator.release import Publisher, due, moved_since_version, release_of
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.roster import Roster
from fedpeft_coordinator.scaling import Scaling
from fedpeft_coordinator.secure import Secure
from fedpeft_coordinator.setup import Setup, TaskSetup, same_facts
from fedpeft_coordinator.state import Round, Site, TaskRound
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.summary import losses, summary, why
from fedpeft_coordinator.transport import Transport
from fedpeft_coordinator.updates import Gathered, Opened


@dataclass
class Coordinator:
    """Runs the rounds of ``setup``; all that it must remember is in ``journal`` and ``store``.

    Raises:
        ConfigError: the journal belongs to a federation that was set up differently.
    """

    setup: Setup
    journal: Journal
    store: Store
    transport: Transport
    events: Events = field(default_factory=Events)
    publisher: Publisher | None = None

    def __post_init__(self) -> None:
        notes = self.journal.notes()
        same_facts(self.setup.renew(notes.get("facts", self.setup.facts)), self.setup.facts)
        self.run_id = str(notes.get("run", uuid.uuid4().hex))
        if "run" not in notes:
            self.journal.note("run", self.run_id)
            self.journal.note("facts", dict(self.setup.facts))
        self.history = self.journal.rounds()
        self.roster = Roster(self.setup, self.journal, self.transport, self.events)
        self._around = Around(self.transport, self.roster, self.events)
        self._scaling = Scaling(self.setup, self.store)
        self._secure = self._masks()
        self._private = private_of(self.setup, self.run_id, self.journal, self.store.root.parent)
        self._rater = Rater(self.setup, self.journal, self._around, self._writer, self._secure, self._private, self.store)
        self._cache: dict[str, Tensors] = {}
        self._advance = Advance(self.setup, self.store, self._load, self._remember)

    def run(self) -> list[Round]:
        """Run until the last round is published; returns all rounds.

        Raises:
            CohortError: too few sites, even after the repeats that ``cohort.retries`` allows.
            LinkError: sites cannot be reached at all.
            StorageError: no space; nothing committed is lost.
        """
        while self.step():
            pass
        return self.history

    def step(self) -> bool:
        """Do one step and commit it; False when there is nothing left to do."""
        last = self.history[-1] if self.history else None
        if last is not None and last.step != "published":
            self._save(self._actions[last.step](last))
            return True
        number = last.number + 1 if last else 1
        if number > self.setup.rounds:
            return False
        self._save(self._plan(number, 0))
        return True

    def tensors(self, task: str, digest: str = "") -> Tensors:
        """The tensors of ``task`` by digest; those of round 0 when it is empty."""
        return self._load(self.setup.tasks[task], digest)

    @property
    def _actions(self) -> dict[str, Callable[[Round], Round]]:
        return {
            "planned": lambda plan: plan.at("collecting"),
            "collecting": self._collect,
            "sealed": self._unseal,
            "combined": self._commit,
            "committed": self._rate,
            "scored": self._gate,
            "gated": self._publish,
        }

    def _save(self, round_: Round) -> None:
        self.journal.save(round_)
        self.history = [past for past in self.history if past.number < round_.number] + [round_]
        self.events("step", round=round_.number, attempt=round_.attempt, step=round_.step)

    # planned ---------------------------------------------------------------------------------------------------------------

    def _plan(self, number: int, attempt: int) -> Round:
        if not self.history:
            for task in self.setup.tasks.values():
                self._load(task, "")  # what cannot start is said before anybody waits
            expected = self.setup.limits.wait_for_sites
            self.roster.wait(
                lambda: len(self.roster.present) >= expected, lambda: f"{len(self.roster.present)} of {expected} sites said hello"
            )
        while not (plan := self._chosen(number, attempt)).asked:
            choosing.wait(plan, lambda: self._planned(number, attempt), self.roster)
        plan = self._bounded(plan)
        self.events("plan", round=number, attempt=attempt, rounds=self.setup.rounds, tasks=summary(plan))
        return plan

    def _chosen(self, number: int, attempt: int) -> Round:
        """The plan once every present site said which clusters it takes; one that comes later takes none in this round."""
        if self.setup.clusters:
            before = self._planned(number, attempt, choosing.undecided)
            choosing.settle(before, self._writer(before), self._around)
        return self._planned(number, attempt)

    def _bounded(self, plan: Round) -> Round:
        """``plan`` under privacy. Where no budget is left, what was trained is published. Raises `PrivacyError`."""
        if self._private is None:
            return plan
        try:
            return self._private.plan(plan, self.history)
        except PrivacyError:
            if self.history and self.history[-1].step == "published":
                self._save(self._versions(self.history[-1]))
            raise

    def _planned(self, number: int, attempt: int, seen: Callable[[Site], Site] = lambda site: site) -> Round:
        awake = [site for name, site in self.roster.refresh().items() if not self.roster.rests(name)]
        sites, shelf = map(seen, awake), sharing.Shelf(self._load, self.store)
        known = Known(self.history, sites, self._load, shelf, self.roster.left_out(number))
        return self._scaling.planned(planning.plan_round(self.setup, number, attempt, known))

    # collecting ------------------------------------------------------------------------------------------------------------

    def _collect(self, plan: Round) -> Round:
        self.roster.refresh()
        if self._secure is not None:
            sealed = self._secure.seal(plan, self._writer(plan))
            return sealed if sealed.step == "sealed" else self._repeat(self._told(sealed))
        updates, drops = gathering.train(plan, self._writer(plan), self._around, self._scaling.lanes)
        rows = {name: replace(plan.tasks[name], drops=drops.get(name, {})) for name in plan.asked}
        plan = plan.at(plan.step, **rows)
        done = self._told(plan.at("combined", **{name: self._combine(plan, name, updates.tasks[name]) for name in rows}))
        return done if done.updated else self._repeat(done)

    def _told(self, done: Round) -> Round:
        self.events("combined", round=done.number, attempt=done.attempt, tasks=summary(done))
        drifts = {name: dict(row.drift) for name, row in done.tasks.items() if row.drift}
        if drifts:
            self.events("drift", round=done.number, tasks=drifts, warnings=losses(done))
        return done

    def _combine(self, at: Round, name: str, mine: Gathered) -> TaskRound:
        """The task's mean, or the task untouched when too few sites contributed."""
        plan, count, least = at.tasks[name], averaging.contributors(self.setup, mine.total), self.setup.limits.min_sites
        if count < least and not planning.sampled(plan):
            return planning.skipped(plan, f"{count} of {len(plan.cohort)} site(s) contributed, cohort.min_sites = {least}")
        current = self._load(self.setup.tasks[plan.task], plan.before)
        try:
            found = self._averaged(at, name, current, mine)
        except UpdateError as fault:
            return planning.skipped(plan, str(fault))
        digest = self.store.put_tensors(found.mean)
        self._advance.means[digest] = found.mean
        drift, means = averaging.drift(self.setup, plan, current, found.mean), self._scaling.learned(plan, digest)
        kept = replace(plan, drift=drift, means=means, inside=found.inside)
        return replace(kept, outcome="updated", mean=digest, weight=found.weight, counters=dict(found.counters))

    def _averaged(self, at: Round, name: str, current: Tensors, mine: Gathered) -> Averaged:
        """What is kept of the task's updates; under privacy nothing but what was noised, stored and charged."""
        if self._private is not None:
            return self._private.averaged(at, name, current, mine.total)
        mean = averaging.average(self.setup, at.tasks[name], current, mine)
        return Averaged(mean, mine.total.weight, dict(mine.total.counters))

    def _repeat(self, done: Round) -> Round:
        """Plan the round again, without those who gave up: no task moved. Raises `CohortError` when it was repeated often enough."""
        tried = self.roster.leave_out(done)
        if tried > self.setup.limits.retries:
            raise CohortError(
                f"round {done.number}: no task got enough answers in {tried} attempts ({why(done)}); "
                "look at the sites' logs, then run the same command again: it goes on from this round"
            )
        return self._plan(done.number, done.attempt + 1)

    # sealed ----------------------------------------------------------------------------------------------------------------

    def _unseal(self, sealed: Round) -> Round:
        """Open the masked sums. What cannot be opened is not asked for again: sites sign one sum of a round."""
        if self._secure is None:
            raise ConfigError(f"round {sealed.number} is a masked sum; set secure_aggregation.enabled back to true to open it")
        sealed = sealed if self._private is None else self._private.before_opening(sealed)
        sums, rows = self._secure.open(sealed), dict(sealed.tasks)
        for name, found in sums.results().items():
            drops = {**rows[name].drops, **sums.left_out(name)}
            rows[name] = replace(rows[name], drops=dict(sorted(drops.items())))
            rows[name] = self._combine(sealed.at("sealed", **rows), name, Opened(found))
        rows |= {name: planning.skipped(rows[name], why) for name, why in sums.lost.items()}
        return self._told(sealed.at("combined", **rows))

    # combined --------------------------------------------------------------------------------------------------------------

    def _commit(self, done: Round) -> Round:
        return done.at("committed", **self._advance(done))

    # committed -------------------------------------------------------------------------------------------------------------

    def _due(self, number: int) -> bool:
        """Whether versions are published after round ``number``."""
        return self.publisher is not None and (number == self.setup.rounds or due(number, self.setup.publish_every))

    def _rate(self, done: Round) -> Round:
        """Score the round where that is due; everything that a version will say is in the journal before it is published."""
        if not (self._due(done.number) or self.setup.scores_after(done.number)):
            return done.at("scored")
        return self._rater.rate(done, self.history, cards=self._due(done.number))

    # scored ----------------------------------------------------------------------------------------------------------------

    def _gate(self, done: Round) -> Round:
        """Let sites train gates of what is published next, where the federation wants them; else publish at once."""
        if not self.setup.routing.gates or not self._due(done.number):
            return self._publish(done)
        moved = [name for name in done.tasks if moved_since_version(name, self.history)]
        return gating.gated(done, moved, self._writer(done), self._around, self._secure, self.store)

    # gated -----------------------------------------------------------------------------------------------------------------

    def _publish(self, done: Round) -> Round:
        if self.publisher is not None and self._due(done.number):
            done = self._versions(done)
        self.store.prune(done.blobs | self._rater.spreads.blobs)
        if self._private is not None:
            self._private.prune(done)
        self.events("round", round=done.number, rounds=self.setup.rounds, tasks=summary(done))
        return done.at("published")

    def _versions(self, done: Round) -> Round:
        publisher = self.publisher
        return done if publisher is None else done.at(done.step, **{name: self._release(done, name, publisher) for name in done.tasks})

    def _release(self, done: Round, name: str, publisher: Publisher) -> TaskRound:
        """Publish one task, unless it never moved or did not move since its last version."""
        row, task = done.tasks[name], self.setup.tasks[name]
        if not moved_since_version(name, self.history):
            return row
        tensors, release = self._load(task, row.current), release_of(name, self.history, row, (self.setup.name, self.run_id))
        version = publisher(task, tensors, replace(release, router=gating.router_card(row, tensors, self.store)))
        self.events("published", round=done.number, task=name, version=version)
        return replace(row, version=version)

    # helpers ---------------------------------------------------------------------------------------------------------------

    def _masks(self) -> Secure | None:
        secure = self.setup.secure
        return None if secure is None else Secure(self.setup, secure, self.run_id, self.journal, self._scaling, self._around)

    def _writer(self, plan: Round) -> Writer:
        kept = self._advance.state, self._advance.told, self._scaling.shifts
        return Writer(self.setup, self.run_id, self.history, self._load, *kept, self._rater.centroids)

    def _remember(self, task: TaskSetup, tensors: Tensors) -> None:
        self._cache[f"{task.name} {tensors.digest}"] = tensors

    def _load(self, task: TaskSetup, digest: str) -> Tensors:
        """Tensors by digest, the latest few kept in memory; round 0 is made from the seed and kept in the store."""
        if not digest:
            made = task.initial()
            digest = self.store.put_tensors(made)
            self._remember(task, made)
        key = f"{task.name} {digest}"
        if key not in self._cache:
            self._cache[key] = self.store.tensors(digest, task.layout)
        while len(self._cache) > 2 * len(self.setup.tasks):
            del self._cache[next(iter(self._cache))]
        return self._cache[key]
