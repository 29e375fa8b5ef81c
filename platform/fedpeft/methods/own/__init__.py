"""Methods that peft lacks: modules of our own around the frozen layers (see README.md)."""

from fedpeft.methods.protocol import Method
from fedpeft.methods.spec import MethodSpec

OWN: dict[str, type[Method]] = {}
OWN_SPECS: dict[str, MethodSpec] = {}

__all__ = ["OWN", "OWN_SPECS"]
