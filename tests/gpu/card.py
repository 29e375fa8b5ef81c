"""Where the GPU tests run: on CUDA, or with ``FEDPEFT_REHEARSE=1`` on a CPU in the types that a card computes in.

A rehearsal finds what types, shapes and settings do wrong before a card is there to find it; it says nothing of memory, streams, speed and
kernels that only a card has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fedpeft.mixtures.fused import available

REHEARSED = os.environ.get("FEDPEFT_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSED else "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
FUSED = ["fused"] if available(DEVICE) or not REHEARSED else []
"""The way of the Triton kernels, which a rehearsal has where they are interpreted (``TRITON_INTERPRET=1``)."""
ON_A_CARD = pytest.mark.skipif(REHEARSED, reason="only a card has this")


@contextmanager
def as_a_card() -> Iterator[None]:
    """Let a CPU compute in the half precisions that `TrainSettings` and `BaseSpec` have on a card of compute capability 8.0 or more."""
    from fedpeft.bases import loading, quantize
    from fedpeft.training import engine, scaling

    def half_of(settings: Any, device: torch.device) -> torch.dtype | None:
        return half(settings, torch.device("cuda", 0))

    def compute_dtype(spec: Any, device: str) -> torch.dtype:
        return dtype(spec, "cuda")

    half, dtype = scaling.half_of, quantize.compute_dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "multiplies_bf16", lambda device: True)
        for module in (scaling, engine):
            patch.setattr(module, "half_of", half_of)
        for module in (quantize, loading):
            patch.setattr(module, "compute_dtype", compute_dtype)
        for name in ("empty_cache", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, lambda: None)
        for name in ("memory_allocated", "max_memory_allocated"):
            patch.setattr(torch.cuda, name, lambda: 0)
        yield
