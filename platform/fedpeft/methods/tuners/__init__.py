"""Methods that peft has: one table row each (see README.md)."""

from fedpeft.methods.protocol import Method
from fedpeft.methods.spec import MethodSpec

TUNERS: dict[str, type[Method]] = {}
TUNER_SPECS: dict[str, MethodSpec] = {}

__all__ = ["TUNERS", "TUNER_SPECS"]
