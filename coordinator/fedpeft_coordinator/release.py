"""What is said about a version, and when one is due; all of it comes from the journal, so publishing twice says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedpeft.routing import RouterCard
from fedpeft.tensors import Tensors
from fedpeft_coordinator.planning import expected, sampled
from fedpeft_coordinator.setup import TaskSetup
from fedpeft_coordinator.state import Round, TaskRound


@dataclass(frozen=True)
class Release:
    """What is said about a version besides its tensors; ``router`` is its router card where sites added gates to it."""

    round: int
    federation: str
    run: str
    metrics: Mapping[str, float]
    card: Mapping[str, Any] | None
    parents: tuple[str, ...]
    weight: float
    examples: int
    sites: int
    kinds: tuple[str, ...]
    router: RouterCard | None = None

    @property
    def origin(self) -> str:
        """Names the act of publishing, so that doing it again after a crash is not a second version."""
        return f"{self.run}/{self.round}"


class Publisher(Protocol):
    """Where versions go; publishing the same tensors twice gives the same digest and no second copy."""

    def __call__(self, task: TaskSetup, tensors: Tensors, release: Release) -> str:
        """Publish and return the version's digest."""
        ...


def due(number: int, every: int) -> bool:
    """Whether something that happens ``every`` so many rounds (0: never) happens after round ``number``."""
    return every > 0 and number % every == 0


def moved_since_version(task: str, history: Sequence[Round]) -> bool:
    """Whether the task's adapter moved after it was last published (or ever, when it never was)."""
    moved = [past.number for past in history if task in past.tasks and past.tasks[task].after]
    versions = [past.number for past in history if task in past.tasks and past.tasks[task].version]
    return bool(moved) and (not versions or moved[-1] > versions[-1])


def release_of(task: str, history: Sequence[Round], rated: TaskRound, names: tuple[str, str]) -> Release:
    """The release of a task that `moved_since_version`; ``names`` are the federation's name and run id."""
    moved = [past for past in history if task in past.tasks and past.tasks[task].after][-1]
    versions = [past.tasks[task].version for past in history if task in past.tasks and past.tasks[task].version]
    last = moved.tasks[task]
    return Release(
        round=moved.number,
        federation=names[0],
        run=names[1],
        metrics=rated.scores,
        card=rated.card,
        parents=tuple(versions[-1:]),
        weight=last.weight,
        examples=int(sum(last.counters.get("train.examples", ()))),
        sites=expected(last) if sampled(last) else len(last.cohort) - len(last.drops),
        kinds=rated.kinds,
    )
