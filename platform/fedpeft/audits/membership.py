"""Membership inference: which rows was an adapter trained on? By loss, and by likelihood ratio with shadow adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.audits.bounds import Finding, audit_scores, likelihood_ratio, logit
from fedpeft.audits.subject import Subject
from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks import Batch, Row
from fedpeft.tensors import Tensors
from fedpeft.training import TrainResult

LEAST = 8
Members = NDArray[np.bool_]


@dataclass(frozen=True)
class Coins:
    """How an audit is drawn and judged: ``seed`` throws a fair coin for each candidate, ``shadows`` (even) adapters calibrate it."""

    seed: int = 0
    shadows: int = 4
    delta: float = 1e-5
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.shadows < 0 or self.shadows % 2:
            raise ConfigError(f"audit: shadows = {self.shadows}; give an even number, as each comes with one on the other half of the rows")


@dataclass(frozen=True)
class Membership:
    """What every attack found, the best last; ``epsilon`` is the bound of the best and holds with the audit's confidence.

    ``done`` is the audited training itself: what an accountant needs to price it, where its engine is private.
    """

    members: int
    findings: tuple[Finding, ...]
    delta: float
    confidence: float
    done: TrainResult

    @property
    def epsilon(self) -> float:
        """No smaller epsilon can be true."""
        return self.findings[-1].epsilon


def audit_membership(subject: Subject, candidates: Sequence[Row], coins: Coins, fixed: Sequence[Row] = ()) -> Membership:
    """Train once on ``fixed`` and a random half of ``candidates``, and guess from the adapter's losses which half that was.

    Protects nothing and sends nothing: it trains one adapter, and two for each pair of shadows, here.

    Raises:
        DataError: fewer than 8 candidates.
        UpdateError: a training diverged.
    """
    if len(candidates) < LEAST:
        raise DataError(f"audit of task {subject.task.name}: {len(candidates)} candidate rows, at least {LEAST} are needed; give more rows")
    draws = np.random.default_rng(coins.seed)
    members = draws.random(len(candidates)) < 0.5
    trial = _Trial(subject, subject.start, candidates, fixed, subject.batches(candidates))
    seen, done = trial.scores(members)
    attacks = {"loss": seen}
    if coins.shadows:
        halves = [draws.random(len(candidates)) < 0.5 for _ in range(coins.shadows // 2)]
        inside = np.array([half for first in halves for half in (first, ~first)])
        shadows = np.array([trial.scores(half)[0] for half in inside])
        attacks["likelihood ratio"] = likelihood_ratio(seen, shadows, inside)
    confidence = 1.0 - (1.0 - coins.confidence) / len(attacks)
    findings = [audit_scores(name, scores, members, coins.delta, confidence) for name, scores in attacks.items()]
    ranked = tuple(sorted(findings, key=lambda finding: (finding.epsilon, finding.auc)))
    return Membership(int(members.sum()), ranked, coins.delta, coins.confidence, done)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Trainings on halves of the candidates, all from one start."""

    subject: Subject
    start: Tensors
    candidates: Sequence[Row]
    fixed: Sequence[Row]
    batches: Sequence[Batch]

    def scores(self, members: Members) -> tuple[NDArray[np.float64], TrainResult]:
        """How sure the adapter is of every candidate's answer, once trained on ``fixed`` and ``members``; and the training."""
        rows = [*self.fixed, *(row for row, inside in zip(self.candidates, members, strict=True) if inside)]
        with self.subject.trained(self.start, rows) as (live, done):
            return logit(self.subject.losses(live, self.batches)), done


def mislabelled(task: Any, rows: Sequence[Row], seed: int) -> list[Row]:
    """Canaries: ``rows`` with a wrong label each, which only training on that very row can teach.

    Raises:
        ConfigError: the task has no list of labels to choose a wrong one from.
    """
    labels, column = getattr(task, "labels", ()), getattr(task, "label", None)
    if len(labels) < 2 or column is None:
        raise ConfigError(f"audit of task {task.name}: a {task.kind} task has no labels to exchange; audit the rows themselves")
    draws = np.random.default_rng((seed, 1))
    return [{**row, column: draws.choice([label for label in labels if label != row[column]])} for row in rows]
