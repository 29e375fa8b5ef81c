"""Where an adapter starts: computed once by the coordinator, shipped as the tensors of round 0, never by rewriting the base.

Importing this imports no torch; a start does when it is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.adapters.starts.factored import OLora, PiSSA
from fedpeft.adapters.starts.given import Experts
from fedpeft.adapters.starts.informed import EVA, CorDA, LoraGA
from fedpeft.adapters.starts.masks import Fisher, Lottery
from fedpeft.adapters.starts.mixed import Mixture
from fedpeft.adapters.starts.protocol import Files, Samples, Start
from fedpeft.adapters.starts.quantized import LoftQ
from fedpeft.config import build

if TYPE_CHECKING:
    from fedpeft.adapters.spec import Adapter, AdapterSpec
    from fedpeft.bases import Base

__all__ = ["STARTS", "Files", "Samples", "Start", "make_start"]

STARTS: dict[str, type[Start]] = {
    "pissa": PiSSA,
    "olora": OLora,
    "loftq": LoftQ,
    "eva": EVA,
    "corda": CorDA,
    "lora-ga": LoraGA,
    "experts": Experts,
    "fisher": Fisher,
    "lottery": Lottery,
    "mixture": Mixture,
}


def make_start(start: Any, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
    """The round-0 adapter of ``spec`` under ``start``: a name of `STARTS`, a table with its settings, or a start itself.

    The same base, spec, seed and samples give the same tensors in every process.

    Raises:
        ValueError: the start or a setting of it is unknown.
        AdapterError: the start does not fit the method or the base, or it needs samples and there are none.
    """
    chosen: Start = build(STARTS, start, "start")
    return chosen.compute(base, spec, seed, samples)
