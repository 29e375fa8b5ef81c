"""Federated averaging schemes, server optimizers and the streaming sum (see README.md)."""

from __future__ import annotations

from fedpeft.schemes.alternating import Alternating
from fedpeft.schemes.base import Controls, Gathers, Masks, Part, Phase, Reports, Scheme, SiteContext, check_start
from fedpeft.schemes.combine import Combine, Sum
from fedpeft.schemes.fedavg import FedAvg
from fedpeft.schemes.ffa import FFA
from fedpeft.schemes.optimizers import SGD, Adagrad, Adam, Momentum, ServerOptimizer, State, Yogi, pack_state, unpack_state

SCHEMES: dict[str, type[Scheme]] = {"alternating": Alternating, "fedavg": FedAvg, "ffa": FFA}
SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {"adagrad": Adagrad, "adam": Adam, "momentum": Momentum, "sgd": SGD, "yogi": Yogi}

__all__ = [
    "FFA",
    "SCHEMES",
    "SERVER_OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "Alternating",
    "Combine",
    "Controls",
    "FedAvg",
    "Gathers",
    "Masks",
    "Momentum",
    "Part",
    "Phase",
    "Reports",
    "Scheme",
    "ServerOptimizer",
    "SiteContext",
    "State",
    "Sum",
    "Yogi",
    "check_start",
    "pack_state",
    "unpack_state",
]
