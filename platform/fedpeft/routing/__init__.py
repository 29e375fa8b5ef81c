"""Request to task: router cards and routers (see README.md)."""

from __future__ import annotations

from fedpeft.routing.cards import BINS, Card, calibrate, centroid, histogram, make_card
from fedpeft.routing.routers import CentroidRouter, Route, TaskRouter

ROUTERS: dict[str, type[TaskRouter] | type[CentroidRouter]] = {"centroid": CentroidRouter, "task": TaskRouter}

__all__ = ["BINS", "ROUTERS", "Card", "CentroidRouter", "Route", "TaskRouter", "calibrate", "centroid", "histogram", "make_card"]
