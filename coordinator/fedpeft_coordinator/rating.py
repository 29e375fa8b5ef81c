"""Scores and router cards of a round: held-out rows counted in the clear, under masks, or with noise, as the federation protects sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedpeft.update import Counters, Update
from fedpeft_coordinator import gathering, scoring, sharing
from fedpeft_coordinator.exchange import Around
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.planning import sampled
from fedpeft_coordinator.privacy import Private
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.secure import Secure
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.spreads import Spreads
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.store import Store

NOTE = "centroids"


@dataclass
class Rater:
    """Rates rounds of ``setup``; ``centroids`` and ``spreads`` of tasks are found once and kept in ``journal``."""

    setup: Setup
    journal: Journal
    around: Around
    writer: Callable[[Round], Writer]
    secure: Secure | None
    private: Private | None
    store: Store
    centroids: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spreads = Spreads(self.store, self.journal)
        self.centroids |= {name: tuple(values) for name, values in self.journal.notes().get(NOTE, {}).items()}

    def rate(self, done: Round, history: Sequence[Round], cards: bool) -> Round:
        """``done`` with its scores, with router cards where ``cards`` are due, and what sharing gains. Raises `LinkError`."""
        unshared = sharing.counterfactual(done)
        without = self._score(unshared, cards=False) if unshared.tasks else {}
        counters = self._evaluate(done, cards)
        rows = {name: self._rated(row, counters.get(name, {})) for name, row in done.tasks.items()}
        self.around.events("scores", round=done.number, tasks={name: dict(row.scores) for name, row in rows.items()})
        if self.setup.sharing is not None and without:
            rows |= sharing.judged(self.setup.sharing, rows, (counters, without), history)
            self.around.events("sharing", round=done.number, tasks=sharing.told(rows))
        return done.at("scored", **rows)

    def _rated(self, row: TaskRound, counters: Counters) -> TaskRound:
        sites = self.around.roster.sites
        named = sites if sampled(row) else row.cohort  # a version must not say who was drawn
        kinds = {sites[site].quantization for site in named if site in sites}
        return replace(
            row,
            scores=scoring.scores(self.setup.tasks[row.task], counters),
            card=scoring.card(row.task, counters, self.centroids.get(row.task), self.setup.encoder),
            moments=self.spreads.kept(row.task, counters),
            kinds=tuple(sorted(kinds - {""})),
        )

    def _evaluate(self, done: Round, cards: bool) -> dict[str, Counters]:
        """Counters of held-out rows, per task; asked a second time where a card is due whose centroid was not known yet."""
        counters = self._score(done, cards)
        self.spreads.learn(counters)
        fresh = {name: found for name in counters if name not in self.centroids and (found := scoring.direction(counters[name]))}
        if fresh:
            self.centroids |= fresh
            self.journal.note(NOTE, {name: list(values) for name, values in self.centroids.items()})
        again = cards and fresh and self.setup.privacy is None  # under privacy it would cost as much again
        return self._score(done, cards) if again else counters

    def _score(self, done: Round, cards: bool) -> dict[str, Counters]:
        """Counters of held-out rows by task; how near rows are to their tasks is asked where ``cards`` are due."""
        roster = self.around.roster
        roster.refresh()
        able = {name: tuple(site.name for site in roster.expected if site.scores(name)) for name in done.tasks}
        if self.private is not None:
            return self.private.score(done, able, set(done.tasks) - set(self.centroids), self._noised)
        if self.setup.privacy is not None:
            return {}  # DP-SGD protects no held-out rows
        writer = replace(self.writer(done), spreads=self.spreads.told() if cards else {})
        if self.secure is not None:
            return self.secure.score(done, able, writer)
        return gathering.score(done, able, writer, self.around)

    def _noised(self, done: Round, able: Mapping[str, tuple[str, ...]]) -> dict[str, Update]:
        if self.secure is not None:
            return self.secure.totals(done, able, self.writer(done))
        return gathering.protected(done, able, self.writer(done), self.around)
