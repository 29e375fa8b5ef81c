"""Many requests over many adapters on one base, batch by batch (see README.md). Importing this imports no torch."""

from __future__ import annotations

from fedpeft.serving.catalog import Catalog, Served, Source
from fedpeft.serving.engine import Engine
from fedpeft.serving.requests import ClosedError, End, Event, Failed, Mixture, OverloadedError, Piece, Request, Sampling, Token
from fedpeft.serving.scheduler import Limits, Scheduler

__all__ = [
    "Catalog",
    "ClosedError",
    "End",
    "Engine",
    "Event",
    "Failed",
    "Limits",
    "Mixture",
    "OverloadedError",
    "Piece",
    "Request",
    "Sampling",
    "Scheduler",
    "Served",
    "Source",
    "Token",
]
