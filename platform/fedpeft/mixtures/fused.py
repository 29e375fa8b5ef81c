"""The way of the Triton kernels: no factor is gathered, no segment launched apart; `available` says whether it can run."""

from __future__ import annotations

import os
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fedpeft.mixtures.ways import Segments


@lru_cache
def available(device: str) -> bool:
    """Whether kernels run on ``device`` (its type): CUDA, or for tests a CPU under Triton's interpreter (``TRITON_INTERPRET=1``)."""
    here = device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return here and find_spec("triton") is not None


class Fused(Segments):
    """Segments by two kernels, for any lengths and ranks."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Way.down`."""
        h = x.new_empty(len(x), a.shape[1])
        self._kernels.rows(x, a, h, self._cut(len(x))[0], False)
        return h

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """See `Way.up`."""
        straight = isinstance(self.plan.place, slice)
        z = self.plan.take(y) if straight else y.new_empty(len(h), y.shape[1])
        self._kernels.rows(h, b, z, self._cut(len(h))[0], straight)
        if not straight:
            self.plan.give(y, z)

    def _outer(self, p: Tensor, q: Tensor, into: Tensor) -> None:
        self._kernels.outer(p, q, into, self._cut(len(p))[1])

    @cached_property
    def _kernels(self) -> Any:
        from fedpeft.mixtures import kernels

        return kernels

    def _cut(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Blocks and whole segments for so many tokens, kept with the plan."""
        kept: dict[int, tuple[Tensor, Tensor]] = self.plan.__dict__.setdefault("_cuts", {})
        if tokens not in kept:
            device: torch.device = self.plan.slots.device
            runs = [(slot, part.start, part.stop) for slot, part in self._runs(tokens)]
            size = self._kernels.BLOCK_N
            kept[tokens] = (self._kernels.blocks_of(runs, size, device), self._kernels.blocks_of(runs, max(tokens, 1), device))
        return kept[tokens]
