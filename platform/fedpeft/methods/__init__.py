"""PEFT methods: how each is put on a base, which tensors it trains, how it is written for peft."""

from fedpeft.methods.lora import Lora
from fedpeft.methods.protocol import Method

METHODS: dict[str, type[Method]] = {"lora": Lora}

__all__ = ["METHODS", "Lora", "Method"]
