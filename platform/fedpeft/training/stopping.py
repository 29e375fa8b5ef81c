"""When a task of a joint job has learnt what it will: a rule from what held-out rows say to tasks that stop, on plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.training.balancing import Vector

State = Mapping[str, NDArray[Any]]
GOING = np.iinfo(np.int64).max
"""Where a task stops that has not stopped yet."""


def start(tasks: int) -> State:
    """The state before the first look: ``best`` cost, looks ``waited`` without a better one, the step ``ended`` at; (T,) each."""
    return {"best": np.full(tasks, np.inf), "waited": np.zeros(tasks, np.int64), "ended": np.full(tasks, GOING, np.int64)}


def looked(state: State, costs: Vector, steps: int, patience: int, min_delta: float) -> State:
    """The state after a look at held-out rows that found ``costs`` (T,), of which less is better, when ``steps`` steps were done.

    A task ends at its ``patience``-th look in a row whose cost is not below the best one by more than ``min_delta``.
    """
    better = costs < state["best"] - min_delta
    waited = np.where(better, 0, state["waited"] + 1)
    ended = np.where((waited >= patience) & (state["ended"] == GOING), steps, state["ended"])
    return {"best": np.where(better, costs, state["best"]), "waited": waited, "ended": ended}
