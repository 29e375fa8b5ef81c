"""Request to task: router cards and routers (see README.md)."""

from __future__ import annotations

from fedpeft.routing.cardfile import FILE, RouterCard, derive
from fedpeft.routing.cards import BINS, Card, calibrate, centroid, counts_of, histogram, make_card
from fedpeft.routing.chain import Calibrated, Chain, Within, thresholds
from fedpeft.routing.fewshot import FewShot
from fedpeft.routing.learned import Learned, XLoraRouter, learned_of
from fedpeft.routing.moments import Measure, Moments, pooled
from fedpeft.routing.policies import make_router
from fedpeft.routing.requests import Request, Route, Router
from fedpeft.routing.routers import CentroidRouter, ClusterRouter, FixedRouter, MahalanobisRouter, MeanRouter, TaskRouter
from fedpeft.routing.tokens import ArrowRouter, GateRouter, SpectrRouter, TokenRouter

ROUTERS: dict[str, type[Router]] = {
    "task": TaskRouter,
    "centroid": CentroidRouter,
    "mahalanobis": MahalanobisRouter,
    "gate": GateRouter,
    "arrow": ArrowRouter,
    "spectr": SpectrRouter,
    "xlora": XLoraRouter,
    "cluster": ClusterRouter,
    "mean": MeanRouter,
    "fewshot": FixedRouter,
    "calibrated": Calibrated,
    "within": Within,
    "chain": Chain,
}

__all__ = [
    "BINS",
    "FILE",
    "ROUTERS",
    "ArrowRouter",
    "Calibrated",
    "Card",
    "CentroidRouter",
    "Chain",
    "ClusterRouter",
    "FewShot",
    "FixedRouter",
    "GateRouter",
    "Learned",
    "MahalanobisRouter",
    "MeanRouter",
    "Measure",
    "Moments",
    "Request",
    "Route",
    "Router",
    "RouterCard",
    "SpectrRouter",
    "TaskRouter",
    "TokenRouter",
    "Within",
    "XLoraRouter",
    "calibrate",
    "centroid",
    "counts_of",
    "derive",
    "histogram",
    "learned_of",
    "make_card",
    "make_router",
    "pooled",
    "thresholds",
]
