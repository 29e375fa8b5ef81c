"""How much each task's loss weighs in a joint step: rules from what was seen to weights, pure functions over plain arrays.

Shape legend: T tasks, N looks in the window, L looks so far. Weights sum to T, so that a rule moves weight between tasks and leaves the
learning rate alone. A rule's state is a table of arrays that goes into the checkpoint as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Vector = NDArray[np.float64]
State = Mapping[str, NDArray[Any]]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Looks = Annotated[int, Field(ge=2)]

DECAY, EPSILON = (0.9, 0.999), 1e-8
"""Adam's own (Kingma & Ba 2015, algorithm 1)."""


class Balance(Protocol):
    """A rule from losses seen to weights of tasks."""

    kind: ClassVar[str]
    looks: ClassVar[bool]
    """Whether it asks for losses on held-out rows."""

    def start(self, sizes: Vector) -> State:
        """The state before the first step, for tasks of ``sizes`` (T,) examples."""

    def weights(self, state: State) -> Vector:
        """(T,) not negative, sum T."""

    def learn(self, state: State, losses: Vector) -> State:
        """The state after a step with mean training ``losses`` (T,), NaN for tasks that were not in it."""

    def look(self, state: State, losses: Vector) -> State:
        """The state after a look at held-out rows, whose mean ``losses`` are (T,)."""


class _Fixed:
    """A rule whose weights never change."""

    looks: ClassVar[bool] = False

    def weights(self, state: State) -> Vector:
        """As they were at the start."""
        return np.asarray(state["weights"], np.float64)

    def learn(self, state: State, losses: Vector) -> State:
        """Nothing."""
        return state

    def look(self, state: State, losses: Vector) -> State:
        """Nothing."""
        return state


@dataclass(frozen=True)
class Equal(_Fixed):
    """Every task weighs the same."""

    kind: ClassVar[str] = "equal"

    def start(self, sizes: Vector) -> State:
        """Ones."""
        return {"weights": np.ones(len(sizes))}


@dataclass(frozen=True)
class Temperature(_Fixed):
    """By size: from each example alike (temperature 1) to each task alike (large), as `mixing.Temperature` does for shares of a step."""

    temperature: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 2.0
    kind: ClassVar[str] = "temperature"

    def start(self, sizes: Vector) -> State:
        """``T n_t^(1/temperature) / sum n^(1/temperature)``."""
        return {"weights": _to_sum(np.asarray(sizes, np.float64) ** (1.0 / self.temperature))}


@dataclass(frozen=True)
class Uncertainty:
    """Homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115, eq. 10): ``exp(-s_t) L_t + s_t / 2`` with ``s_t = log sigma_t^2``.

    The log-variances s are trained by Adam at ``lr``; the adapters' step takes ``exp(-s_t)`` scaled to sum T: what all tasks have in common
    is the learning rate's.
    """

    lr: Rate = 0.025
    kind: ClassVar[str] = "uncertainty"
    looks: ClassVar[bool] = False

    def start(self, sizes: Vector) -> State:
        """All variances 1."""
        return {name: np.zeros(len(sizes)) for name in ("log_variance", "mean", "square", "steps")}

    def weights(self, state: State) -> Vector:
        """``T exp(-s_t) / sum exp(-s)``."""
        s = state["log_variance"]
        return _to_sum(np.exp(s.min() - s))

    def learn(self, state: State, losses: Vector) -> State:
        """One step of Adam on the log-variances of the tasks that were in the step."""
        seen, s = np.isfinite(losses), state["log_variance"]
        slope = np.where(seen, 0.5 - np.exp(-s) * losses, 0.0)
        steps = state["steps"] + seen
        mean = np.where(seen, DECAY[0] * state["mean"] + (1 - DECAY[0]) * slope, state["mean"])
        square = np.where(seen, DECAY[1] * state["square"] + (1 - DECAY[1]) * slope**2, state["square"])
        first, second = (1 - beta ** np.maximum(steps, 1) for beta in DECAY)
        move = self.lr * (mean / first) / (np.sqrt(square / second) + EPSILON)
        return {"log_variance": s - np.where(seen, move, 0.0), "mean": mean, "square": square, "steps": steps}

    def look(self, state: State, losses: Vector) -> State:
        """Nothing."""
        return state


@dataclass(frozen=True)
class CoBa:
    """Convergence balancer (Gong et al. 2024, arXiv 2410.06741, section 3) from slopes of held-out losses.

    Slopes are of least-squares lines through the last ``history`` losses, each as a share of its task's first. While all tasks
    converge, the slowest weighs most (relative scores); when one begins to diverge (``tau`` says how sharply that is felt), tasks that
    still converge weigh more (absolute scores). The first ``warmup`` looks leave all weights equal.
    """

    history: Looks = 10
    warmup: Looks = 3
    tau: Rate = 5.0
    kind: ClassVar[str] = "coba"
    looks: ClassVar[bool] = True

    def start(self, sizes: Vector) -> State:
        """Nothing was seen."""
        return {"tasks": np.array(len(sizes), np.int64)}

    def weights(self, state: State) -> Vector:
        """``T (DF RCS_t + (1 - DF) ACS_t)``."""
        tasks = int(state["tasks"])
        if "worst" not in state or len(state["worst"]) + 1 < self.warmup:
            return np.ones(tasks)
        slopes, worst = state["slopes"], state["worst"]
        now, window = slopes[:, -1], slopes.shape[1]
        relative = _softmax(tasks * _over(now, np.abs(now).sum()))
        absolute = _softmax(-window * _over(now, np.abs(slopes).sum(1)))
        felt = _softmax(-self.tau * len(worst) * _over(worst, np.abs(worst).sum()))
        divergence = min(len(worst) * float(felt[-1]), 1.0)
        return tasks * (divergence * relative + (1.0 - divergence) * absolute)

    def learn(self, state: State, losses: Vector) -> State:
        """Nothing: training losses do not tell convergence from overfitting."""
        return state

    def look(self, state: State, losses: Vector) -> State:
        """One more point of every task's curve, and its slope from the second on."""
        first = state.get("first", losses)
        column = _over(losses, first)[:, None]
        ratios = np.hstack([state.get("ratios", column[:, :0]), column])[:, -self.history :]
        found = {**state, "first": first, "ratios": ratios}
        if ratios.shape[1] < 2:
            return found
        slope = _slopes(ratios)
        slopes = np.hstack([state.get("slopes", column[:, :0]), slope[:, None]])[:, -self.history :]
        return {**found, "slopes": slopes, "worst": np.append(state.get("worst", np.zeros(0)), slope.max())}


BALANCES: dict[str, type[Balance]] = {"equal": Equal, "temperature": Temperature, "uncertainty": Uncertainty, "coba": CoBa}


def among(weights: Vector, present: NDArray[np.bool_]) -> Vector:
    """``weights`` (T,) of the tasks that are there, in the same proportions, summing to their number; 0 for all others."""
    kept = np.where(present, weights, 0.0)
    return kept if present.all() else _over(kept, kept.sum()) * float(present.sum())


def _to_sum(values: Vector) -> Vector:
    return np.asarray(values / values.sum() * len(values))


def _softmax(values: Vector) -> Vector:
    raised = np.exp(values - values.max())
    return np.asarray(raised / raised.sum())


def _over(values: Vector, by: Any) -> Vector:
    """``values / by``, 0 where that is 0."""
    by = np.broadcast_to(np.asarray(by, np.float64), values.shape)
    return np.asarray(np.divide(values, by, out=np.zeros_like(values), where=by != 0))


def _slopes(curves: Vector) -> Vector:
    """(T,) of the least-squares lines through ``curves`` (T, N) at 0, 1, 2, ..."""
    at = np.arange(curves.shape[1]) - (curves.shape[1] - 1) / 2
    found: Vector = (curves - curves.mean(1, keepdims=True)) @ (at / (at @ at))
    return found
