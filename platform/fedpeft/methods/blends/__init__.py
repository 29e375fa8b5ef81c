"""Methods made of methods: hybrids, fusions and mixtures saved as one adapter (see README.md)."""

from fedpeft.methods.protocol import Method
from fedpeft.methods.spec import MethodSpec

BLENDS: dict[str, type[Method]] = {}
BLEND_SPECS: dict[str, MethodSpec] = {}

__all__ = ["BLENDS", "BLEND_SPECS"]
