"""Factors that the tasks of a group share: where a task stands, the common step, what sharing gained, and who leaves the group.

All of it is a function of journal and store. A group only ever gets smaller: tasks leave it alone or in clusters, none comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.merging.clusters import clusters, cosines
from fedpeft.schemes import Phase, Sharing, State, realign
from fedpeft.tensors import Tensors
from fedpeft.update import Counters
from fedpeft_coordinator.setup import TaskSetup
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.store import Store

Load = Callable[[TaskSetup, str], Tensors]
EVERYBODY = "*"
"""The group of all tasks at the start."""
LOST_AT_MOST = 0.05
"""How much of its product a task may lose to take over its group's factor after it was away; above it the task goes on alone."""


@dataclass(frozen=True)
class Shelf:
    """Where tensors and optimizer states are kept by digest; ``load`` gives those of round 0 for an empty one."""

    load: Load
    store: Store

    def keep(self, tensors: Tensors, state: State) -> tuple[str, str]:
        """Keep both; their digests, the second empty for no state."""
        return self.store.put_tensors(tensors), self.store.put_state(state)


@dataclass(frozen=True)
class Begin:
    """Where a task starts a round: digests of adapter and optimizer state, its group, whether it just took over the group's factor."""

    before: str
    state: str
    group: str = ""
    aligned: bool = False


def latest(task: str, history: Sequence[Round]) -> TaskRound | None:
    """The task's row of the last round that has one."""
    return next((past.tasks[task] for past in reversed(history) if task in past.tasks), None)


def group_of(task: str, history: Sequence[Round]) -> str:
    """The group that ``task`` is in after ``history``."""
    row = latest(task, history)
    return EVERYBODY if row is None else row.moved_to or row.group or EVERYBODY


def alone(task: str) -> str:
    """The name of a group of one."""
    return f"={task}"


def members(group: str, tasks: Iterable[str], history: Sequence[Round]) -> list[str]:
    """The tasks of ``group``, by name."""
    return sorted(task for task in tasks if group_of(task, history) == group)


def next_number(tasks: Iterable[str], history: Sequence[Round]) -> int:
    """The number of the next round of ``tasks`` that move in step: one more than any of them has moved in."""
    return 1 + max((row.number for past in history for task, row in past.tasks.items() if task in tasks and row.after), default=0)


def leader(sharing: Sharing, group: Sequence[str], history: Sequence[Round]) -> str | None:
    """The first of ``group``'s tasks that took part in the last step of what is shared; None before there was any."""
    for past in reversed(history):
        for task in group:
            row = past.tasks.get(task)
            if row is not None and row.after and sharing.roles & row.moves:
                return task
    return None


def plainly(tasks: Mapping[str, TaskSetup], name: str, history: Sequence[Round], load: Load) -> Begin:
    """Where task ``name`` starts if it is left as it is."""
    row = latest(name, history)
    before, state = (row.current, row.current_state) if row else (load(tasks[name], "").digest, "")
    return Begin(before, state, group_of(name, history))


def waits(sharing: Sharing | None, phase: Phase) -> bool:
    """Whether a task that just took over its group's factor sits ``phase`` out, as it moves that factor before the task's own."""
    return sharing is not None and bool(sharing.roles & phase.roles) and sharing.share != "both"


def begin(sharing: Sharing, tasks: Mapping[str, TaskSetup], name: str, history: Sequence[Round], shelf: Shelf) -> Begin:
    """Where task ``name`` starts its next round: with the shared factor as its group has it, whatever it missed (ALGORITHMS B2).

    Its own factor is fitted to the new one. Where that would change its product too much, it leaves the group and goes on as it is.
    """
    mine = plainly(tasks, name, history, shelf.load)
    lead = leader(sharing, members(mine.group, tasks, history), history)
    ahead = latest(lead, history) if lead is not None and lead != name else None
    if lead is None or ahead is None:
        return mine
    now = shelf.load(tasks[name], mine.before)
    shared = shelf.load(tasks[lead], ahead.current).pick(sharing.roles)
    if np.array_equal(now.pick(sharing.roles).flat, shared.flat):
        return mine
    moved, lost = realign(now, shared)
    if lost > LOST_AT_MOST:
        return replace(mine, group=alone(name))
    state = _with_moments(shelf.store.state(mine.state), shelf.store.state(ahead.current_state), sharing.roles)
    return Begin(*shelf.keep(moved, state), mine.group, aligned=True)


def _with_moments(own: State, common: State, roles: frozenset[str]) -> State:
    """``own`` with the moments of the shared ``roles`` as the group has them."""
    kept = {key: value for key, value in own.items() if key.partition(".")[0] not in roles}
    return kept | {key: value for key, value in common.items() if key.partition(".")[0] in roles}


def joined(sharing: Sharing, done: Round, means: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The ``means`` of a round's updated tasks, those of one group with one common step of what they share."""
    out = dict(means)
    for group in {done.tasks[name].group for name in means}:
        mine = [name for name in sorted(means) if done.tasks[name].group == group and sharing.roles & set(done.tasks[name].roles)]
        if len(mine) > 1:
            rows = {name: done.tasks[name].weight * done.tasks[name].weight_cap for name in mine}
            step = sharing.joint({name: means[name] for name in mine}, rows)
            out |= {name: means[name].patch(step) for name in mine}
    return out


def counterfactual(done: Round) -> Round:
    """``done`` as if every task had taken the step of its own rows alone, for the tasks that took their group's."""
    rows = {name: replace(row, after=row.alone) for name, row in done.tasks.items() if row.alone and row.after}
    return replace(done, tasks=rows)


def gain(shared: Counters, own: Counters) -> dict[str, float]:
    """Mean held-out loss after the group's step and after the task's own, and what sharing gained; empty where nothing was scored."""
    after, without = _loss(shared), _loss(own)
    return {} if after is None or without is None else {"shared": after, "alone": without, "gain": without - after}


def _loss(counters: Counters) -> float | None:
    total, count = (sum(counters.get(f"adapter.{name}", ())) for name in ("loss", "count"))
    return float(total / count) if count else None


def judged(
    sharing: Sharing,
    rows: Mapping[str, TaskRound],
    counters: tuple[Mapping[str, Counters], Mapping[str, Counters]],
    history: Sequence[Round],
) -> dict[str, TaskRound]:
    """The ``rows`` that shared a step, with what that gained and whether the task leaves; ``counters`` with it and without it, by task."""
    out = {}
    for name, row in rows.items():
        found = gain(counters[0].get(name, {}), counters[1].get(name, {})) if row.alone else {}
        if found:
            row = replace(row, gain=found)
            out[name] = replace(row, moved_to=row.moved_to or leaving(sharing, row, history))
    return out


def told(rows: Mapping[str, TaskRound]) -> dict[str, dict[str, object]]:
    """Groups, gains and moves as events tell them."""
    return {name: {"group": row.group, "gain": dict(row.gain), "moved_to": row.moved_to} for name, row in rows.items() if row.group}


def leaving(sharing: Sharing, row: TaskRound, history: Sequence[Round]) -> str:
    """The group that the task of ``row`` moves to because it lost by sharing ``split_after`` times in a row; empty while it stays."""
    if not sharing.split_after or row.group == alone(row.task):
        return ""
    past = [old.tasks[row.task].gain for old in history if row.task in old.tasks and old.tasks[row.task].gain]
    recent = [*past, row.gain][-sharing.split_after :] if row.gain else []
    lost = len(recent) == sharing.split_after and all(found["gain"] < 0 for found in recent)
    return alone(row.task) if lost else ""


def regrouped(rows: Mapping[str, TaskRound], adapters: Mapping[str, Tensors]) -> dict[str, TaskRound]:
    """The ``rows`` of tasks whose group is cut into clusters; ``adapters`` are those of the tasks that ever moved, as they are now."""
    out: dict[str, TaskRound] = {}
    for group in sorted({row.group for row in rows.values()}):
        mine = [name for name in sorted(adapters) if rows[name].group == group]
        labels = clusters(cosines([adapters[name] for name in mine])) if len(mine) > 2 else ()
        if len(set(labels)) > 1:
            out |= {name: replace(rows[name], moved_to=f"{group}.{label}") for name, label in zip(mine, labels, strict=True)}
    return out
