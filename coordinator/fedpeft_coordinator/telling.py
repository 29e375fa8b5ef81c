"""A committed step as sites are told of it: in a codec, with what it leaves out kept in the server's state for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.schemes import State
from fedpeft.tensors import Tensors
from fedpeft.wire import codecs
from fedpeft.wire.codecs import DeltaCodec
from fedpeft_coordinator.state import Round, TaskRound

KEPT = "down."
"""What the state's names of residuals begin with; a role follows."""


@dataclass(frozen=True)
class Step:
    """What sites will hold of the roles that moved, the message that says so, and the state to keep."""

    after: Tensors
    message: NDArray[np.uint8]
    state: State


def tell(codec: DeltaCodec, before: Tensors, after: Tensors, state: State) -> Step:
    """The step from ``before`` to ``after``, the roles that moved. Raises `UpdateError` when a value is not finite."""
    residual = Tensors.zeros(before.layout)
    for role, span in before.layout.role_spans.items():
        residual.flat[span] = state.get(f"{KEPT}{role}", residual.flat[span])
    message, held, left = codecs.tell(codec, before, after, residual)
    kept = {f"{KEPT}{role}": left.flat[span].copy() for role, span in left.layout.role_spans.items()}
    return Step(held, np.frombuffer(message, np.uint8), {**state, **kept})


def step_of(task: str, have: str, current: str, history: Sequence[Round]) -> TaskRound | None:
    """The round whose message brings ``have`` to ``current``, while it is kept: no later round of the task is over."""
    rows = [past.tasks[task] for past in history[-2:] if task in past.tasks]
    return next((row for row in reversed(rows) if row.told and (row.before, row.after) == (have, current)), None)
