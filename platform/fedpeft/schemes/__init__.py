"""Federated averaging schemes, server optimizers and the streaming sum (see README.md)."""

from __future__ import annotations

from fedpeft.schemes.alternating import Alternating
from fedpeft.schemes.base import Controls, Gathers, Masks, Part, Phase, Reports, Scheme, SiteContext, check_start
from fedpeft.schemes.cartesian import Cartesian
from fedpeft.schemes.combine import Combine, Sum
from fedpeft.schemes.fedavg import FedAvg
from fedpeft.schemes.feddpa import FedDPA
from fedpeft.schemes.fedex import FedEx
from fedpeft.schemes.fedrot import FedRot
from fedpeft.schemes.fedsa import FedSA
from fedpeft.schemes.fedsb import FedSB
from fedpeft.schemes.fedsvd import FedSVD
from fedpeft.schemes.ffa import FFA
from fedpeft.schemes.flexlora import FlexLoRA
from fedpeft.schemes.flora import FLoRA
from fedpeft.schemes.optimizers import SGD, Adagrad, Adam, Momentum, ServerOptimizer, State, Yogi, pack_state, unpack_state
from fedpeft.schemes.scaffold import Scaffold
from fedpeft.schemes.sharing import Sharing, realign
from fedpeft.schemes.sketch import Sketch
from fedpeft.schemes.slots import Slots
from fedpeft.schemes.union import Union

SCHEMES: dict[str, type[Scheme]] = {
    "alternating": Alternating,
    "cartesian": Cartesian,
    "fedavg": FedAvg,
    "feddpa": FedDPA,
    "fedex": FedEx,
    "fedrot": FedRot,
    "fedsa": FedSA,
    "fedsb": FedSB,
    "fedsvd": FedSVD,
    "ffa": FFA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "scaffold": Scaffold,
    "sketch": Sketch,
    "slots": Slots,
    "union": Union,
}
SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {"adagrad": Adagrad, "adam": Adam, "momentum": Momentum, "sgd": SGD, "yogi": Yogi}

__all__ = [
    "FFA",
    "SCHEMES",
    "SERVER_OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "Alternating",
    "Cartesian",
    "Combine",
    "Controls",
    "FLoRA",
    "FedAvg",
    "FedDPA",
    "FedEx",
    "FedRot",
    "FedSA",
    "FedSB",
    "FedSVD",
    "FlexLoRA",
    "Gathers",
    "Masks",
    "Momentum",
    "Part",
    "Phase",
    "Reports",
    "Scaffold",
    "Scheme",
    "ServerOptimizer",
    "Sharing",
    "SiteContext",
    "Sketch",
    "Slots",
    "State",
    "Sum",
    "Union",
    "Yogi",
    "check_start",
    "pack_state",
    "realign",
    "unpack_state",
]
