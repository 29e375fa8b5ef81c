"""A round as events and displays tell it."""

from __future__ import annotations

from typing import Any

from fedpeft.update import Counters
from fedpeft_coordinator.state import Round, TaskRound

DRIFT_LIMIT = 0.5
"""The largest rho = ||C|| / ||U|| that passes without a warning: C is what averaging the factors loses of the update U."""


def why(plan: Round) -> str:
    """Why tasks of ``plan`` did not move, in one line."""
    return "; ".join(f"task {name}: {row.reason}{_dropped(row)}" for name, row in plan.tasks.items() if row.outcome == "skipped")


def _dropped(row: TaskRound) -> str:
    return "".join(f"; {site} dropped out: {reason}" for site, reason in row.drops.items())


def summary(plan: Round) -> dict[str, Any]:
    """Per task: phase, cohort, outcome, drop-outs and reasons, adapter, mean training loss, what averaging lost."""
    return {
        name: {
            "phase": row.phase,
            "cohort": list(row.cohort),
            "outcome": row.outcome,
            "reason": row.reason,
            "drops": dict(row.drops),
            "adapter": row.current,
            "weight": row.weight,
            "loss": _loss(row.counters),
            "drift": dict(row.drift),
            "group": row.group,
        }
        for name, row in plan.tasks.items()
    }


def losses(done: Round) -> list[str]:
    """One line for each task of which averaging lost more than `DRIFT_LIMIT` of the update."""
    return [
        f"averaging lost more than half of the update of task {name} in round {done.number} (rho {row.drift['drift']:.2f}): "
        'take fewer local steps, or scheme.kind = "alternating"'
        for name, row in done.tasks.items()
        if row.drift.get("drift", 0.0) > DRIFT_LIMIT
    ]


def _loss(counters: Counters) -> float | None:
    total, count = counters.get("train.loss", (0.0, 0.0))
    return total / count if count else None
