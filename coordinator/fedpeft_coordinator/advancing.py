"""From the means of a round to the next adapters: the scheme's step, or the common one where tasks share factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.schemes import State
from fedpeft.tensors import Tensors
from fedpeft_coordinator import averaging, planning, sharing
from fedpeft_coordinator.planning import Load
from fedpeft_coordinator.setup import Setup, TaskSetup
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.telling import tell


@dataclass
class Advance:
    """Moves the adapters of a round's updated tasks; a function of journal and store. ``means`` saves reading what was just written."""

    setup: Setup
    store: Store
    load: Load
    remember: Callable[[TaskSetup, Tensors], None]
    means: dict[str, Tensors] = field(default_factory=dict)

    def __call__(self, done: Round) -> dict[str, TaskRound]:
        """The updated tasks with their next adapters, or skipped where the step is no adapter."""
        rows = {name: done.tasks[name] for name in done.updated}
        if self.setup.sharing is None:
            return {name: self._moved(row, self._mean(row)) for name, row in rows.items()}
        own = {name: self._mean(row) for name, row in rows.items()}
        common = sharing.joined(self.setup.sharing, done, own)
        report = self.setup.sharing.report
        moved = {name: self._moved(row, common[name], own[name] if report else None) for name, row in rows.items()}
        return moved | (self._clustered({**done.tasks, **moved}) if done.number == self.setup.sharing.cluster_after else {})

    def _clustered(self, rows: Mapping[str, TaskRound]) -> dict[str, TaskRound]:
        adapters = {name: self.load(self.setup.tasks[name], row.current) for name, row in rows.items()}
        return sharing.regrouped(rows, {name: found for name, found in adapters.items() if found.pick({"B"}).flat.any()})

    def state(self, row: TaskRound) -> State:
        """The server's state before ``row``."""
        return self.store.state(row.state)

    def told(self, row: TaskRound) -> NDArray[np.uint8]:
        """The message of the step that ``row`` made."""
        return self.store.arrays(row.told)["message"]

    def _moved(self, row: TaskRound, mean: Tensors, own: Tensors | None = None) -> TaskRound:
        """``row`` moved by ``mean``; ``own``, the mean of its sites alone, gives what sharing is compared with."""
        task = self.setup.tasks[row.task]
        try:
            (after, kept), told = self._step(row, mean), ""
            if self.setup.limits.down is not None:
                step = tell(self.setup.limits.down, self.load(task, row.before).pick(row.moves), after.pick(row.moves), kept)
                after, kept, told = after.patch(step.after), step.state, self.store.put_arrays({"message": step.message})
            alone = "" if own is None or own is mean else self.store.put_tensors(self._step(row, own)[0])
        except UpdateError as fault:
            return planning.skipped(row, str(fault))
        self.remember(task, after)
        return replace(row, after=self.store.put_tensors(after), state_after=self.store.put_state(kept), alone=alone, told=told)

    def _step(self, row: TaskRound, mean: Tensors) -> tuple[Tensors, State]:
        current = self.load(self.setup.tasks[row.task], row.before)
        after, kept = self.setup.scheme.advance(current, mean, planning.phase_of(row), self.setup.server, self.state(row))
        if not after.finite:
            raise UpdateError("the server optimizer's step is not finite; lower server.lr")
        return after, kept

    def _mean(self, row: TaskRound) -> Tensors:
        return self.means.pop(row.mean, None) or self.store.tensors(row.mean, averaging.mean_layout(self.setup, row))
