"""How the shared factors move under the schemes that leave it open: one at a time, both, or B alone."""

from __future__ import annotations

from typing import Literal

from fedpeft.schemes.alternating import Alternating
from fedpeft.schemes.base import Scheme
from fedpeft.schemes.fedavg import FedAvg
from fedpeft.schemes.ffa import FFA

Factors = Literal["alternating", "both", "ffa"]
MODES: dict[Factors, Scheme] = {"alternating": Alternating(), "both": FedAvg(probes=0), "ffa": FFA()}
