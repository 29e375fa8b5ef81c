"""PEFT methods: how each is put on a base, which tensors it trains, what averaging it means, how it is written for peft."""

from __future__ import annotations

from typing import Any

from fedpeft.config import build
from fedpeft.methods.bitfit import BitFit
from fedpeft.methods.blends import BLEND_SPECS, BLENDS
from fedpeft.methods.bottleneck import Bottleneck
from fedpeft.methods.core import Core
from fedpeft.methods.facts import CORE_SPECS
from fedpeft.methods.ia3 import IA3
from fedpeft.methods.lora import Lora
from fedpeft.methods.own import OWN, OWN_SPECS
from fedpeft.methods.protocol import Method
from fedpeft.methods.soft import PrefixTuning, PromptTuning
from fedpeft.methods.spec import MethodSpec
from fedpeft.methods.tuners import REFUSED, TUNER_SPECS, TUNERS

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "core": Core,
    "ia3": IA3,
    "bitfit": BitFit,
    "prompt": PromptTuning,
    "prefix": PrefixTuning,
    "bottleneck": Bottleneck,
    **TUNERS,
    **OWN,
    **BLENDS,
}
SPECS: dict[str, MethodSpec] = {**CORE_SPECS, **TUNER_SPECS, **OWN_SPECS, **BLEND_SPECS}
"""The facts of every method of ``METHODS``, under the same names."""

__all__ = [
    "IA3",
    "METHODS",
    "REFUSED",
    "SPECS",
    "BitFit",
    "Bottleneck",
    "Core",
    "Lora",
    "Method",
    "MethodSpec",
    "PrefixTuning",
    "PromptTuning",
    "read_method",
]


def read_method(value: Any) -> Method:
    """`fedpeft.config.build` over ``METHODS``. Raises `ValueError`, with the reason for what peft has and is not offered."""
    kind = value.get("kind") if isinstance(value, dict) else value
    if isinstance(kind, str) and kind in REFUSED:
        raise ValueError(f"method: {kind!r} is not offered: {REFUSED[kind]}")
    return build(METHODS, value, "method")
