"""Hidden states that checkpointing keeps, at rest in pinned host memory: they come back one layer ahead of the backward pass.

Copies run on a stream of their own beside the computation. On a machine without CUDA the states are in host memory already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

SMALL = 1 << 18
"""Tensors of fewer elements stay where they are."""


@dataclass(eq=False)
class Kept:
    """One tensor at rest: its host copy, the one kept before it, and its copy on the device once that is on its way."""

    host: Tensor
    device: torch.device
    before: Kept | None
    fetched: Tensor | None = None


class HostStore:
    """Takes tensors to the host as they are saved, and fetches them in the opposite order."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        self._last: Kept | None = None

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        """What is saved in place of ``tensor``."""
        if self._stream is None or not tensor.is_cuda or tensor.numel() < SMALL:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        self._last = Kept(host, tensor.device, self._last)
        return self._last

    def unpack(self, saved: Tensor | Kept) -> Tensor:
        """The tensor again; the one that was kept before it sets out too."""
        if isinstance(saved, Tensor):
            return saved
        value = self._fetch(saved)
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        value.record_stream(current)
        saved.fetched, self._last, before = None, saved.before, saved.before
        if before is not None:
            self._fetch(before)
        saved.before = None
        return value

    def _fetch(self, kept: Kept) -> Tensor:
        if kept.fetched is None:
            with torch.cuda.stream(self._stream):
                kept.fetched = kept.host.to(kept.device, non_blocking=True)
        return kept.fetched


def checkpointer(offload: bool) -> Callable[..., Any]:
    """Non-reentrant activation checkpointing of one call; what it keeps goes to the host with ``offload``."""
    store = HostStore() if offload else None

    def run(function: Callable[..., Any], *args: Any) -> Any:
        if store is None:
            return checkpoint(function, *args, use_reentrant=False)
        with saved_tensors_hooks(store.pack, store.unpack):
            return checkpoint(function, *args, use_reentrant=False)

    return run
