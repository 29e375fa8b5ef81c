"""PEFT methods: how each is put on a base, which tensors it trains, how it is written for peft."""

from fedpeft.methods.bitfit import BitFit
from fedpeft.methods.bottleneck import Bottleneck
from fedpeft.methods.ia3 import IA3
from fedpeft.methods.lora import Lora
from fedpeft.methods.protocol import Method
from fedpeft.methods.soft import PrefixTuning, PromptTuning

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "ia3": IA3,
    "bitfit": BitFit,
    "prompt": PromptTuning,
    "prefix": PrefixTuning,
    "bottleneck": Bottleneck,
}

__all__ = ["IA3", "METHODS", "BitFit", "Bottleneck", "Lora", "Method", "PrefixTuning", "PromptTuning"]
