"""What the journal remembers: a round with its tasks, and the sites; plain values with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Step = Literal["planned", "collecting", "sealed", "combined", "committed", "scored", "gated", "published"]
Outcome = Literal["open", "updated", "skipped"]


@dataclass(frozen=True)
class TaskRound:
    """One task in one round: the plan (fixed before anything is sent) and, later, what became of it.

    ``before``, ``state``, ``mean``, ``after`` and ``state_after`` are digests in the store; ``state`` and ``state_after`` belong
    to the server optimizer. ``drops`` names the sites that did not contribute, and why. ``scores``, ``card`` and ``kinds`` (how
    the sites held the base) are known once the round is scored; ``version`` is set where it was published. ``number`` is the task's
    own round, ``private`` and ``settles`` are the other roles of the scheme's phase, ``drift`` is what averaging lost. ``sealed`` is
    the digest of its masked sums, empty where sites sent theirs in the clear. ``group`` is whom the task shares factors with, ``alone`` the
    adapter had it not shared this step, ``gain`` what the two lose on held-out rows, ``moved_to`` the group that it leaves for.
    ``ring`` describes the ring of narrow codes, if there is one, ``scales`` is the digest of its shifts, and ``means`` are digests of
    the last means by fingerprint of what travelled. ``told`` is that of the message by which ``before`` becomes ``after``, empty where
    values go down as they are. ``privacy`` is the mechanism that protects its sum (None: nothing does), ``inside`` the noised share of
    sites within its bound.
    """

    task: str
    phase: str
    roles: tuple[str, ...]
    cohort: tuple[str, ...]
    seed: int
    weight_cap: int
    before: str
    state: str
    outcome: Outcome = "open"
    reason: str = ""
    mean: str = ""
    weight: float = 0.0
    counters: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    drops: Mapping[str, str] = field(default_factory=dict)
    after: str = ""
    state_after: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    card: Mapping[str, Any] | None = None
    kinds: tuple[str, ...] = ()
    version: str = ""
    number: int = 0
    private: tuple[str, ...] = ()
    settles: tuple[str, ...] = ()
    drift: Mapping[str, float] = field(default_factory=dict)
    sealed: str = ""
    gates: str = ""
    moments: str = ""
    group: str = ""
    alone: str = ""
    gain: Mapping[str, float] = field(default_factory=dict)
    moved_to: str = ""
    ring: Mapping[str, Any] | None = None
    scales: str = ""
    means: Mapping[str, str] = field(default_factory=dict)
    told: str = ""
    privacy: Mapping[str, Any] | None = None
    inside: float | None = None

    @property
    def moves(self) -> frozenset[str]:
        """Roles of the global adapter that may differ after the round."""
        return frozenset(self.roles) | frozenset(self.settles)

    @property
    def current(self) -> str:
        """The global adapter once this round is over: untouched unless it was updated."""
        return self.after or self.before

    @property
    def current_state(self) -> str:
        """The server optimizer's state once this round is over."""
        return self.state_after or self.state

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> TaskRound:
        """Inverse of `dataclasses.asdict` after a trip through JSON; a row of an earlier version lacks what it did not know."""
        lists = {name: tuple(row.get(name, ())) for name in ("roles", "cohort", "kinds", "private", "settles")}
        counters = {name: tuple(values) for name, values in row["counters"].items()}
        return TaskRound(**{**row, **lists, "counters": counters})


@dataclass(frozen=True)
class Round:
    """One round and how far it came; ``attempt`` counts repeats after too few answers."""

    number: int
    attempt: int
    step: Step
    tasks: Mapping[str, TaskRound]

    @property
    def asked(self) -> list[str]:
        """Tasks with a cohort to ask; one of which secret dice chose nobody is a round of noise all the same."""
        return [name for name, task in self.tasks.items() if task.outcome != "skipped" and (task.cohort or task.privacy)]

    @property
    def updated(self) -> list[str]:
        """Tasks whose global adapter moves."""
        return [name for name, task in self.tasks.items() if task.outcome == "updated"]

    @property
    def blobs(self) -> set[str]:
        """Digests in the store that the next round may need."""
        rows = self.tasks.values()
        named = ((row.before, row.after, row.state, row.state_after, row.told, row.gates, row.moments, *row.means.values()) for row in rows)
        return {blob for blobs in named for blob in blobs if blob}

    def at(self, step: Step, **tasks: TaskRound) -> Round:
        """This round one step on, with some tasks replaced."""
        return replace(self, step=step, tasks={**self.tasks, **tasks})

    def to_json(self) -> dict[str, Any]:
        """The tasks' JSON form."""
        return {name: asdict(task) for name, task in self.tasks.items()}


@dataclass(frozen=True)
class Site:
    """What is known of a site: training and held-out examples and the adapter kept, per task; how it was last seen.

    ``passes`` are clusters of its rows that it does not take, ``unfit`` tasks whose rows it could not use: its worker must be started
    again before it is asked to train them.
    """

    name: str
    train: Mapping[str, int] = field(default_factory=dict)
    test: Mapping[str, int] = field(default_factory=dict)
    have: Mapping[str, str] = field(default_factory=dict)
    instance: str = ""
    base_loads: int = 0
    device: str = ""
    quantization: str = ""
    vanished: bool = False
    refused: str = ""
    passes: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    def trains(self, task: str) -> bool:
        """Whether it has rows of ``task`` that it can use, and takes it."""
        return self.train.get(task, 0) > 0 and task not in (*self.passes, *self.unfit)

    def scores(self, task: str) -> bool:
        """Whether it has held-out rows of ``task`` and takes it."""
        return self.test.get(task, 0) > 0 and task not in self.passes

    @property
    def usable(self) -> bool:
        """Whether rounds may count on it."""
        return not (self.vanished or self.refused)
