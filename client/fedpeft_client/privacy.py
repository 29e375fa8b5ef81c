"""The site's half of privacy: what it promises its rows, what it has spent, and how an answer is protected before it leaves.

Two units are kept apart: the whole site (a plan's mechanism, or the clip and noise of the site's own policy) and single rows (DP-SGD).
The ledger holds every answer that left, whatever became of its round; it takes no credit for sampling, which a site cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.errors import DataError, PolicyError, PrivacyError
from fedpeft.privacy.accounting import Event
from fedpeft.privacy.clipping import clipped
from fedpeft.privacy.ledger import Budget, Charge, Kind, Ledger, Unit
from fedpeft.privacy.mechanism import Mechanism, check_shares, protect
from fedpeft.privacy.noise import SecureNoise
from fedpeft.privacy.promise import Promise, Single, Whole
from fedpeft.privacy.selftest import sample, self_test
from fedpeft.privacy.settings import steps_noise
from fedpeft.tensors import Layout, Tensors
from fedpeft_client.config import Policy

if TYPE_CHECKING:
    from fedpeft.privacy.secagg import Instance
    from fedpeft.training.dp import DpEngine
    from fedpeft.training.settings import TrainSettings


@dataclass(frozen=True)
class Steps:
    """One job of DP-SGD: its ``noise`` multiplier, the ``clip`` of a row's gradient, the ``rate`` of rows and the ``count`` of steps."""

    noise: float
    clip: float
    rate: float
    count: int

    @staticmethod
    def of(promise: Single, settings: TrainSettings, examples: int) -> Steps:
        """The job of one round of a run that spreads its budget over all of its rounds. Raises `DataError` without rows."""
        if examples < 1:
            raise DataError("the train split holds no rows; check [data] of the site's file")
        rate = min(1.0, settings.batch_size * settings.accumulate / examples)
        return Steps(steps_noise(promise.settings, rate, settings.steps * promise.rounds), promise.clip, rate, settings.steps)

    @property
    def engine(self) -> DpEngine:
        """What trains."""
        from fedpeft.training.dp import DpEngine

        return DpEngine(self.noise, self.clip)

    @property
    def event(self) -> Event:
        """What the job costs."""
        return Event(self.noise, self.rate, self.count)


@dataclass(frozen=True)
class Spending:
    """What an answer would cost its task: the ``charges``, and the task's ``epsilon`` with them; None: it is not accounted."""

    charges: tuple[Charge, ...] = ()
    epsilon: float | None = None


@dataclass
class Guard:
    """Keeps the privacy of the site ``name`` under its ``policy``; the ledger lies in ``folder``."""

    name: str
    policy: Policy
    folder: Path

    @cached_property
    def ledger(self) -> Ledger:
        """What this site's rows have spent."""
        return Ledger(self.folder)

    @property
    def budget(self) -> Budget:
        """What the policy allows for a task."""
        return Budget(self.policy.max_epsilon or inf, self.policy.delta)

    @property
    def own(self) -> Mechanism | None:
        """The noise that this site adds by itself to what it trained, as if it were alone; None where its policy names none."""
        if not self.policy.noise:
            return None
        assert self.policy.clip is not None, "the policy's own check"
        return Mechanism(self.policy.noise, self.policy.clip, sites=1, shares=1)

    def foresee(self, key: str, task: str, kind: Kind, events: Sequence[tuple[Unit, Event]]) -> Spending:
        """What an answer named ``key`` would cost: ``events`` with what each protects. Nothing is written.

        Raises:
            PrivacyError: the answer's name was spent on something else.
        """
        charges = tuple(Charge(f"{key}/{unit}", task, kind, event, (self.name,), unit) for unit, event in events)
        after = [self.ledger.require(charge, Budget(inf, self.policy.delta)) for charge in charges]
        return Spending(charges, max(after, default=None))

    def spend(self, spending: Spending) -> float:
        """Write an answer's cost, on disk before it leaves; the same answer costs once. Returns the task's epsilon.

        Raises:
            PrivacyError: the policy's budget would be exceeded; the answer must not leave.
            StorageError: the ledger is damaged or cannot be written.
        """
        return max((self.ledger.spend(charge, self.budget) for charge in spending.charges), default=0.0)

    def events(self, promise: Promise | None, layout: Layout, steps: Steps | None) -> list[tuple[Unit, Event]]:
        """What one answer of ``layout`` costs, by what it protects; empty where nothing does."""
        found: list[tuple[Unit, Event]] = []
        if steps is not None:
            found.append(("example", steps.event))
        whole = [] if self.own is None or not layout.size else [self.own.event(layout.size)]
        if isinstance(promise, Whole):
            mechanism = promise.mechanism
            whole.append(replace(mechanism.event(mechanism.layout(layout).size), rate=1.0))
        if whole:
            found.append(("site", max(whole, key=lambda event: event.noise)))
        return found

    def check(self, promise: Promise | None, instance: Instance | None, layout: Layout) -> None:
        """Refuse a plan whose noise would not be there.

        Raises:
            PrivacyError: noise shares without masks, or among more sites than open the sum; or noise that is not what it says.
        """
        if not isinstance(promise, Whole):
            return
        mechanism = promise.mechanism
        if mechanism.shares and instance is None:
            raise PrivacyError(
                f"privacy: this site would add 1/{mechanism.shares} of the noise and send in the clear, where that protects too little; "
                "nothing is sent: the coordinator must mask sums, or add the noise itself with privacy.kind = 'central'"
            )
        if mechanism.shares and instance is not None:
            check_shares(mechanism, instance.fewest - int(instance.colluding * len(instance.members)))
        if layout.size:
            self_test(mechanism, sample(layout), SecureNoise())

    def disturb(self, delta: Tensors) -> Tensors:
        """``delta`` under the clip and the noise of this site's own policy; as it is where there are none.

        Raises:
            PrivacyError: it is not finite.
        """
        bound = self.policy.clip
        if bound is not None:
            delta = Tensors(delta.layout, clipped(delta.flat, bound).astype(np.float32))
        if self.own is None:
            return delta
        noisy = protect(delta, {}, self.own, SecureNoise())
        return Tensors(delta.layout, (noisy.codes * noisy.grid.step).astype(np.float32))

    def describe(self, promise: Promise | None) -> str:
        """How answers to such a plan are bounded and noised, for the record of what left."""
        parts = []
        if isinstance(promise, Whole):
            one = promise.mechanism
            who = f"this site adds 1/{one.shares} of the noise" if one.shares else "the coordinator adds the noise"
            parts.append(f"site: norm {one.clip:.6g}, noise {one.noise:.6g} of it in the sum, {who}")
        if isinstance(promise, Single):
            parts.append(f"rows: DP-SGD, norm {promise.clip:.6g}")
        if self.policy.clip is not None:
            parts.append(f"policy: norm {self.policy.clip:.6g}, noise {self.policy.noise:.6g} of it")
        return "; ".join(parts)

    def check_scores(self, promise: Promise | None) -> None:
        """Refuse to send counters in the clear where this site demands noise. Raises `PolicyError`."""
        if isinstance(promise, Single):
            raise PrivacyError("privacy: DP-SGD protects rows that are trained on, nothing protects held-out ones; nothing is scored")
        if self.policy.noise and promise is None:
            raise PolicyError(
                f"noise: policy.noise = {self.policy.noise:g} and an evaluation, whose counters carry no noise; nothing is sent: set "
                "[privacy] with evaluation in the federation, or policy.noise = 0"
            )
