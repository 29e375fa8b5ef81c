"""Scores and router cards from sums: what an evaluation exchange's counters say once they are added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedpeft.update import Counters
from fedpeft_coordinator.setup import TaskSetup

LOWEST_SHARE = 0.05
"""The share of a task's own rows that may fall below its card's threshold."""


def part(counters: Counters, prefix: str) -> Counters:
    """The counters under ``prefix``, without it."""
    return {name.removeprefix(prefix): values for name, values in counters.items() if name.startswith(prefix)}


def scores(task: TaskSetup, counters: Counters) -> dict[str, float]:
    """Metrics of the global adapter, and those of the base alone under ``base.``."""
    found: dict[str, float] = {}
    for prefix, label in (("adapter.", ""), ("base.", "base.")):
        mine = part(counters, prefix)
        found |= {f"{label}{name}": float(value) for name, value in (task.scores(mine) if mine else {}).items()}
    return found


def centroid(counters: Counters) -> tuple[float, ...] | None:
    """The mean direction of all train rows' embeddings, of length 1; None when no site sent any."""
    total = np.asarray(counters.get("embedding.sum", ()), np.float64)
    length = float(np.linalg.norm(total))
    if not total.size or length <= 0 or not np.isfinite(length):
        return None
    return tuple(float(value) for value in (total / length).astype(np.float32))


def threshold(histogram: tuple[float, ...]) -> float:
    """The cosine below which at most ``LOWEST_SHARE`` of a task's own rows lie; bins are equal parts of [-1, 1]."""
    counts = np.asarray(histogram, np.float64)
    edges = np.linspace(-1.0, 1.0, counts.size + 1)
    below = np.concatenate([[0.0], np.cumsum(counts)]) / max(counts.sum(), 1.0)
    return float(edges[np.flatnonzero(below <= LOWEST_SHARE).max()])


def card(task: str, counters: Counters, direction: tuple[float, ...] | None) -> Mapping[str, Any] | None:
    """The router card; None when the sites sent no embeddings."""
    histogram = counters.get(f"cosine.{task}", ())
    if direction is None or not histogram:
        return None
    return {"centroid": list(direction), "threshold": threshold(histogram), "count": int(sum(histogram))}
