"""A round as events and displays tell it."""

from __future__ import annotations

from typing import Any

from fedpeft.update import Counters
from fedpeft_coordinator.state import Round


def why(plan: Round) -> str:
    """Why tasks of ``plan`` did not move, in one line."""
    return "; ".join(f"task {name}: {row.reason}" for name, row in plan.tasks.items() if row.outcome == "skipped")


def summary(plan: Round) -> dict[str, Any]:
    """Per task: phase, cohort, outcome, drop-outs and reasons, adapter, mean training loss."""
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
        }
        for name, row in plan.tasks.items()
    }


def _loss(counters: Counters) -> float | None:
    total, count = counters.get("train.loss", (0.0, 0.0))
    return total / count if count else None
