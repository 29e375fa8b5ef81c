"""Adapters of every method that a bank holds, a batch for them, and what each says alone."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch

from fedpeft.adapters import attach

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
"""Whether Triton kernels run here, on a CPU (`make kernels`)."""
TABLES = {
    "wide": {"kind": "lora", "r": 4, "targets": ["all"]},
    "twin": {"kind": "lora", "r": 4, "targets": ["all"]},
    "rs": {"kind": "lora", "r": 3, "rslora": True},
    "two": {"kind": "lora", "r": 2, "extra": 2},
    "gain": {"kind": "ia3"},
    "bias": {"kind": "bitfit"},
    "bottle": {"kind": "bottleneck", "dim": 5},
    "prompt": {"kind": "prompt", "tokens": 3},
    "longer": {"kind": "prompt", "tokens": 5},
    "prefix": {"kind": "prefix", "tokens": 4},
    "hydra": {"kind": "hydralora", "r": 3, "experts": 3, "targets": ["all"]},
    "moe": {"kind": "molora", "r": 2, "experts": 3, "top": 2},
}
ROWS = ["wide", "gain", "rs", None, "bottle", "prompt", "bias", "twin", "prefix", "wide", "longer", "two", "hydra", "moe", "hydra"]


def losses(logits):
    return [row[torch.isfinite(row)].square().mean() for row in logits]


def alone(base, adapters, batch):
    """Logits of every row under its own adapter alone, and the gradients of each adapter."""
    logits, grads = {}, {}
    for name, adapter in adapters.items():
        rows = [i for i, row in enumerate(ROWS) if row == name]
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            out = live.model(**{key: value[rows] for key, value in batch.items()}).logits
            sum(losses(out)).backward()
            logits |= {row: part.detach() for row, part in zip(rows, out, strict=True)}
            grads[name] = live.grad.clone()
    return logits, grads


def near(found, wanted, tolerance=1e-5):
    assert float((found.detach() - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def bf16_products_of_values() -> None:
    """Triton's interpreter holds bf16 as integers and multiplies those; from here on it multiplies what they stand for, in float32."""
    from triton.runtime import interpreter

    own = interpreter.InterpreterBuilder.create_dot

    def valued(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda builder, a, b, *rest: own(builder, valued(a), valued(b), *rest)
