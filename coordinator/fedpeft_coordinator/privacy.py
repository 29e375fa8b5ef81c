"""The coordinator's half of client-level differential privacy: bounds in plans, one draw of noise a sum, charges before releases.

Order: the budget is asked before a round is planned; the noised result is on disk (`Releases`), then in the ledger, and only then
in an adapter, a score or an event. Under ``distributed`` noise the opened sum is the release, so it is charged before it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from pathlib import Path

from fedpeft.errors import ConfigError, PrivacyError, UpdateError
from fedpeft.privacy.clipping import moved
from fedpeft.privacy.ledger import Budget, Charge, Kind, Ledger
from fedpeft.privacy.mechanism import Mechanism, Released, check_sum, release
from fedpeft.privacy.metric import Metric
from fedpeft.privacy.noise import SecureNoise
from fedpeft.privacy.selftest import check_release, sample, self_test
from fedpeft.privacy.settings import Client, Cohort, Distributed, noise_for, of_adapter, of_evaluation, scored_rounds
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import TRAIN_COUNTERS, WORD, Counters, Update
from fedpeft.wire.codecs import as_ring
from fedpeft_coordinator.averaging import Averaged
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.planning import expected, mechanism_of, phase_of, sampled, skipped
from fedpeft_coordinator.releases import Releases
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.updates import up_layout

NOTE = "noise"
NOTHING = Layout(())
Gather = Callable[[Round, Mapping[str, tuple[str, ...]]], Mapping[str, Update]]
"""The protected sums of one exchange over the sites of each task."""


@dataclass
class Private:
    """What the rounds of ``setup`` need of privacy; its ledger and its releases lie in ``folder``.

    Raises:
        PrivacyError: no noise keeps the run within its budget.
    """

    setup: Setup
    settings: Client
    run: str
    journal: Journal
    folder: Path

    def __post_init__(self) -> None:
        self.ledger, self.releases = Ledger(self.folder / "ledger"), Releases(self.folder / "releases")
        self.budget = Budget(self.settings.epsilon, self.settings.delta)

    @cached_property
    def noise(self) -> float:
        """The run's noise multiplier: calibrated once and kept, whatever is set later."""
        known = self.journal.notes().get(NOTE)
        if known is None:
            scored = scored_rounds(self.setup.rounds, self.setup.evaluate_every, self.setup.publish_every)
            known = noise_for(self.settings, self.setup.rounds, scored)
            self.journal.note(NOTE, known)
        return float(known)

    # before a round --------------------------------------------------------------------------------------------------------

    def plan(self, plan: Round, history: Sequence[Round]) -> Round:
        """``plan`` with the bound and the noise of each task; one whose budget does not reach is left out by name.

        Raises:
            PrivacyError: the budget reaches for no task at all, or the self-test failed.
        """
        rows, refused = {}, []
        for name in plan.asked:
            try:
                row = self._protected(plan.tasks[name], history)
                self.ledger.require(self._charge(plan, row), self.budget)
            except PrivacyError as fault:
                row = skipped(plan.tasks[name], str(fault))
                refused.append(fault)
            rows[name] = row
        if refused and len(refused) == len(rows):
            raise refused[0]
        for row in rows.values():
            self._test(row)
        return plan.at("planned", **{name: self._drawn(row) for name, row in rows.items()})

    def before_opening(self, sealed: Round) -> Round:
        """Charge the sums that are about to be opened, where opening is the release; a refused one is never opened."""
        if not isinstance(self.settings, Distributed):
            return sealed
        rows = {}
        for name, row in sealed.tasks.items():
            try:
                if row.sealed:
                    self.ledger.spend(self._charge(sealed, row), self.budget)
            except PrivacyError as fault:
                rows[name] = replace(skipped(row, str(fault)), sealed="")
        return sealed.at(sealed.step, **rows)

    # after a round ---------------------------------------------------------------------------------------------------------

    def averaged(self, at: Round, name: str, current: Tensors, total: Update) -> Averaged:
        """The noised mean of a task's sum, stored and charged.

        Raises:
            UpdateError: the sum cannot be one of protected vectors: a site lied under its mask.
            PrivacyError: the budget is spent, or what would be released is not what was promised; nothing is released.
        """
        row = at.tasks[name]
        try:
            check_sum(total, mechanism_of(row))
        except PrivacyError as fault:
            raise UpdateError(str(fault)) from None
        found = self._released(self._charge(at, row), mechanism_of(row), up_layout(self.setup, row), lambda: total)
        weight = float(expected(row)) if sampled(row) else total.weight
        mean = Metric.of(current, phase_of(row).roles).back(found.mean)
        return Averaged(mean, weight, counted(found.counters), found.inside)

    def prune(self, done: Round) -> None:
        """Forget the results of rounds before ``done``, which is over; the ledger forgets nothing."""
        self.releases.prune({f"{self._name(done, name)}/{what}" for name in done.tasks for what in ("adapter", "metrics")})

    def score(self, done: Round, able: Mapping[str, tuple[str, ...]], wanted: Collection[str], gather: Gather) -> dict[str, Counters]:
        """Noised counters of held-out rows by task: stored and charged. Tasks of which nothing is released are not asked for.

        ``wanted`` are the tasks whose centroid is not known yet. Raises `PrivacyError` as `averaged` does.
        """
        found, asked = self._known(done), {}
        for name, sites in able.items():
            mechanism = None if name in found or not sites else self._evaluation(name, sites, name in wanted)
            if mechanism is not None:
                asked[name] = self._drawn(replace(done.tasks[name], privacy=mechanism.to_json(), cohort=sites))
        charges = {name: self._measured(done, row, able[name]) for name, row in asked.items()}
        open_ = {name for name, charge in charges.items() if self._affordable(charge)}
        round_ = done.at(done.step, **{name: asked[name] for name in open_})
        totals = gather(round_, {name: asked[name].cohort for name in sorted(open_)}) if open_ else {}
        for name in sorted(totals):
            mechanism, total = mechanism_of(asked[name]), totals[name]
            if total.count >= (mechanism.shares or int(mechanism.rate == 1)):
                found[name] = self._released(charges[name], mechanism, NOTHING, lambda total=total: total)  # type: ignore[misc]
        return {name: counted(released.counters) for name, released in found.items()}

    # parts -----------------------------------------------------------------------------------------------------------------

    def _protected(self, row: TaskRound, history: Sequence[Round]) -> TaskRound:
        sites, ring = len(row.cohort), None if self.setup.limits.codec is None else as_ring(self.setup.limits.codec)
        cohort = Cohort(sites, self._least(sites), WORD if ring is None else ring.width(sites))
        mechanism = of_adapter(self.settings, self.noise, cohort, TRAIN_COUNTERS, self._clip(row.task, history))
        _check_steps(mechanism, up_layout(self.setup, row).size)
        return replace(row, privacy=mechanism.to_json())

    def _evaluation(self, name: str, sites: tuple[str, ...], embedding: bool) -> Mechanism | None:
        known = self.setup.tasks[name].counters
        lengths = {key: length for key, length in known.items() if not key.startswith("cosine." if embedding else "embedding.")}
        try:
            return of_evaluation(self.settings, self.noise, Cohort(len(sites), self._least(len(sites))), lengths)
        except PrivacyError:
            return None  # too few sites for masks, or to carry the noise: nothing is asked

    def _least(self, sites: int) -> int:
        return sites if self.setup.secure is None else self.setup.secure.fewest(sites)

    def _clip(self, task: str, history: Sequence[Round]) -> float:
        """The norm of the coming round: that of the last one, moved by what it released where it is adaptive."""
        rows = [past.tasks[task] for past in history if task in past.tasks and past.tasks[task].inside is not None]
        if not (self.settings.quantile and rows):
            return self.settings.clip
        last, inside = mechanism_of(rows[-1]).clip, rows[-1].inside
        return moved(last, float(inside or 0.0), self.settings.quantile, self.settings.pace, self.settings.clip)

    def _drawn(self, row: TaskRound) -> TaskRound:
        """``row`` with the part of its sites that secret dice chose, where the federation samples."""
        if not sampled(row):
            return row
        chosen = SecureNoise().chosen(len(row.cohort), mechanism_of(row).rate)
        return replace(row, cohort=tuple(site for site, takes_part in zip(row.cohort, chosen, strict=True) if takes_part))

    def _test(self, row: TaskRound) -> None:
        if row.privacy:
            self_test(mechanism_of(row), sample(up_layout(self.setup, row)), SecureNoise())

    def _charge(self, at: Round, row: TaskRound) -> Charge:
        mechanism = mechanism_of(row)
        event = mechanism.event(mechanism.layout(up_layout(self.setup, row)).size)
        sites = () if sampled(row) else row.cohort
        return Charge(f"{self._name(at, row.task)}/adapter", row.task, "adapter", event, sites)

    def _measured(self, at: Round, row: TaskRound, able: tuple[str, ...]) -> Charge:
        mechanism = mechanism_of(row)
        kind: Kind = "centroid" if any(name.startswith("embedding.") for name in mechanism.counters) else "metrics"
        name = f"{self._name(at, row.task)}/metrics"
        again = sum(entry.charge.id.partition("#")[0] == name for entry in self.ledger.entries())
        event = mechanism.event(mechanism.layout(NOTHING).size)
        return Charge(f"{name}#{again}" if again else name, row.task, kind, event, able)

    def _affordable(self, charge: Charge) -> bool:
        """Whether an evaluation may be asked for; charged at once where opening its sum is the release."""
        try:
            ask = self.ledger.spend if isinstance(self.settings, Distributed) else self.ledger.require
            ask(charge, self.budget)
        except PrivacyError:
            return False
        return True

    def _known(self, done: Round) -> dict[str, Released]:
        """Evaluations of the round that were drawn before a crash, charged now at the latest."""
        found = {}
        for name in done.tasks:
            kept = self.releases.get(f"{self._name(done, name)}/metrics", NOTHING)
            if kept is not None:
                self.ledger.spend(kept[0], self.budget)
                found[name] = kept[1]
        return found

    def _released(self, charge: Charge, mechanism: Mechanism, layout: Layout, total: Callable[[], Update]) -> Released:
        """The result under the charge's name: what is stored, or drawn now, checked and stored; charged either way."""
        name = charge.id.partition("#")[0]
        kept = self.releases.get(name, layout)
        if kept is None:
            summed = total()
            drawn = release(summed, mechanism, SecureNoise())
            check_release(summed, drawn, mechanism)
            kept = charge, drawn
            self.releases.put(name, charge, drawn)
        self.ledger.spend(kept[0], self.budget)
        return kept[1]

    def _name(self, at: Round, task: str) -> str:
        return f"{self.run}/{at.number}/{at.attempt}/{task}"


def _check_steps(mechanism: Mechanism, size: int) -> None:
    """Refuse a grid so coarse that rounding alone fills the norm of ``size`` values. Raises `ConfigError`."""
    rounding = mechanism.grid.step * sqrt(size)
    if rounding > mechanism.clip:
        raise ConfigError(
            f"wire.codec leaves {mechanism.bits} bits for the sum of {mechanism.sites} sites: rounding {size} values to steps of "
            f"{mechanism.grid.step:.3g} adds up to a norm of {rounding:.3g}, privacy.clip is {mechanism.clip:g}, so deltas would be scaled "
            'down to nothing; take codec = { kind = "ring", bits = 16 }, or none'
        )


def private_of(setup: Setup, run: str, journal: Journal, folder: Path) -> Private | None:
    """The privacy of ``setup``'s rounds, kept in ``folder``; None where its sums are not noised here."""
    return Private(setup, setup.privacy, run, journal, folder) if isinstance(setup.privacy, Client) else None


def counted(counters: Counters) -> Counters:
    """Noised ``counters`` as what they are: counts and losses are not negative; sums of embeddings may be."""
    return {name: values if name == "embedding.sum" else tuple(max(value, 0.0) for value in values) for name, values in counters.items()}
