"""Methods made of methods: hybrids, fusions and mixtures saved as one adapter (see README.md)."""

from fedpeft.methods.blends.compose import Compose, spec_of
from fedpeft.methods.blends.facts import BLEND_SPECS
from fedpeft.methods.blends.fusion import AdapterFusion
from fedpeft.methods.blends.mixtures import HydraLora, MoLora
from fedpeft.methods.blends.prompts import Attempt, Mpt
from fedpeft.methods.blends.unipelt import UniPelt
from fedpeft.methods.blends.xlora import XLora
from fedpeft.methods.protocol import Method

BLENDS: dict[str, type[Method]] = {
    "compose": Compose,
    "unipelt": UniPelt,
    "adapterfusion": AdapterFusion,
    "hydralora": HydraLora,
    "molora": MoLora,
    "xlora": XLora,
    "mpt": Mpt,
    "attempt": Attempt,
}

__all__ = ["BLENDS", "BLEND_SPECS", "Compose", "spec_of"]
