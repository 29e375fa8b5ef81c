"""How the tasks of a job weigh against each other while it runs: the rule's weights, conflicts over what is shared, early ends.

All of it is decided from sums over all ranks, so that it is the same on each, and its state goes through the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.central.conflicts import Conflicts, Handling
from fedpeft.central.held import held_losses
from fedpeft.central.joint import Joint
from fedpeft.central.pool import Pool
from fedpeft.central.scoring import Scorer
from fedpeft.central.world import World
from fedpeft.tasks.metrics import upward
from fedpeft.training import stopping
from fedpeft.training.balancing import Balance, Equal, Vector, among

if TYPE_CHECKING:
    from fedpeft.training.config import Validation

Arrays = dict[str, NDArray[Any]]
EXAMPLES = "(examples)|"
"""Before a task's name in a checkpoint."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a job's file says of it, and the rows held out (None: nobody looks at any)."""

    balance: Balance = field(default_factory=Equal)
    conflicts: Handling = "ignore"
    validation: Validation | None = None
    held: Pool | None = None
    seed: int = 0

    def __repr__(self) -> str:
        return repr((self.balance, self.conflicts, self.validation))


class Balancing:
    """A plan under way; ``told`` is what it has to say of the last step, by name: weights, cosines, held-out losses and scores.

    ``judge`` scores the held-out rows of the tasks that end early by another metric than the loss, each by that one alone.
    """

    def __init__(self, plan: Plan, live: Joint, world: World, judge: Scorer | None = None) -> None:
        self.plan, self.live, self.world, self.judge = plan, live, world, judge
        self.state = plan.balance.start(np.array([len(data) for data in live.pool.data], np.float64))
        self.stops = stopping.start(len(live.pool.names))
        self.conflicts = Conflicts(live, plan.conflicts, world, plan.seed) if plan.conflicts != "ignore" else None
        self.told: dict[str, float] = {}

    @property
    def plain(self) -> bool:
        """Whether this is what a job does that says nothing of it."""
        return repr(self.plan) == repr(Plan())

    def going(self, number: int) -> NDArray[np.bool_]:
        """(T,) the tasks that take part in step ``number``, from 0; known up to the step after the last one done."""
        return np.asarray(self.stops["ended"] > number)

    def weights(self, present: NDArray[np.bool_]) -> Vector:
        """(T,) the share of each task in the step's loss: they sum to 1 over those that are there."""
        weights = among(np.asarray(self.plan.balance.weights(self.state)), present)
        self.told = {} if isinstance(self.plan.balance, Equal) else self._named("weight", weights)
        return weights / max(float(present.sum()), 1.0)

    def begin(self, zero: Any, number: int, size: int) -> None:
        """Before step ``number``: the first look, which others are measured by."""
        if self.plan.held is not None and number == 0:
            self._look(zero, 0, size)

    def settle(self, zero: Any, number: int) -> None:
        """After the last backward of step ``number``, before the engine steps."""
        if self.conflicts is not None:
            self.conflicts.settle(zero, number)
            self.told |= {f"cosine/{pair}": value for pair, value in self.conflicts.cosines.items()}

    def learn(self, zero: Any, number: int, losses: Vector, size: int) -> None:
        """After step ``number``, whose mean training ``losses`` are (T,), NaN for tasks that were not in it."""
        self.state = self.plan.balance.learn(self.state, losses)
        if self.plan.validation is not None and (number + 1) % self.plan.validation.every == 0:
            self._look(zero, number + 1, size)

    def arrays(self) -> Arrays:
        """What `restore` needs, and how many examples each task has."""
        stops = self.plan.validation is not None and self.plan.validation.patience is not None
        held = {"balance": self.state} | ({"stops": self.stops} if stops else {})
        sizes = {f"{EXAMPLES}{name}": np.array(len(data)) for name, data in zip(self.live.pool.names, self.live.pool.data, strict=True)}
        return sizes | {f"({part})|{name}": np.array(value) for part, table in held.items() for name, value in table.items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` gave."""
        for part in ("balance", "stops"):
            found = {name.partition("|")[2]: np.array(value) for name, value in arrays.items() if name.startswith(f"({part})|")}
            if found and part == "balance":
                self.state = found
            elif found:
                self.stops = found

    def _look(self, zero: Any, steps: int, size: int) -> None:
        assert self.plan.held is not None
        assert self.plan.validation is not None
        losses = held_losses(zero, self.live.model, self.plan.held, size, self.world)
        self.state = self.plan.balance.look(self.state, losses)
        self.told |= self._named("held", losses)
        if self.plan.validation.patience is not None:
            costs = self._costs(losses)
            self.stops = stopping.looked(self.stops, costs, steps, self.plan.validation.patience, self.plan.validation.min_delta)

    def _costs(self, losses: Vector) -> Vector:
        """(T,) what patience judges by, less being better: the loss, or the task's own metric."""
        costs = dict(zip(self.live.pool.names, losses, strict=True))
        for name, scores in (self.judge() if self.judge else {}).items():
            ((metric, value),) = scores.items()
            costs[name] = -upward(metric, value)
            self.told[f"held/{name}/{metric}"] = value
        return np.array(list(costs.values()), np.float64)

    def _named(self, what: str, values: Vector) -> dict[str, float]:
        return {f"{what}/{name}": float(value) for name, value in zip(self.live.pool.names, values, strict=True)}
