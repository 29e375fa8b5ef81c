"""What bounds a step: the FLOP that it must multiply, and the rate of a large product on this device."""

from __future__ import annotations

import time

import torch
from tests.bench._random import SHAPES


def flop_per_token(shape: str, checkpointed: bool, sequence: int) -> float:
    """What a step must multiply: blocks forward, input gradient and forward again; causal attention; the output layer once each way."""
    from transformers import LlamaConfig

    c, passes = LlamaConfig(**SHAPES[shape]), 3 if checkpointed else 2
    heads = c.num_key_value_heads / c.num_attention_heads
    linears = c.num_hidden_layers * (c.hidden_size**2 * (2 + 2 * heads) + 3 * c.hidden_size * c.intermediate_size)
    attention = c.num_hidden_layers * 2 * sequence * c.hidden_size
    return 2 * passes * linears + (passes + 1) * attention + 4 * c.hidden_size * c.vocab_size


def matmul_rate(device: str) -> float:
    """FLOP per second of a large product, the fastest of a few."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
