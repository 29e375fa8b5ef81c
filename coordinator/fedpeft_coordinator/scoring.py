"""Scores and router cards from sums: what an evaluation exchange's counters say once they are added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.errors import AdapterError
from fedpeft.routing import Card, calibrate, centroid
from fedpeft.update import Counters
from fedpeft_coordinator.setup import TaskSetup


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


def direction(counters: Counters) -> tuple[float, ...] | None:
    """The centroid of all train rows' embeddings; None when no site sent any, or they cancel."""
    try:
        return tuple(centroid(counters.get("embedding.sum", (0.0,)), sum(counters.get("embedding.count", ()))).tolist())
    except AdapterError:
        return None


def card(task: str, counters: Counters, centre: tuple[float, ...] | None, encoder: str = "") -> Mapping[str, Any] | None:
    """The router card, for embeddings by ``encoder``; None when sites sent none, or other histograms than asked for."""
    cosines = counters.get(f"cosine.{task}", ())
    if centre is None or not cosines:
        return None
    try:
        return Card(centre, calibrate(cosines), int(sum(cosines)), encoder, tuple(cosines)).to_json()
    except AdapterError:
        return None
