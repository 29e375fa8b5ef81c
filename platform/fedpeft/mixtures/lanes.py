"""One adapter in several lanes: equal values, gradients apart, so that one backward pass tells what each task asks of a shared adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpeft.mixtures.plans import Share, pairs_of_rows
from fedpeft.mixtures.slabs import Slab


class Split(torch.autograd.Function):
    """A parameter once a lane; the gradient of each lane is added to its sink, their sum is the parameter's own."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, sink: Tensor) -> Tensor:
        """(L, ...) for a sink of that shape."""
        ctx.sink = sink
        return parameter.detach().expand(len(sink), *parameter.shape).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The sum over lanes."""
        ctx.sink += grad
        return grad.sum(0), None


@dataclass(eq=False)
class Lanes(Slab):
    """A slab whose rows are all the adapter in ``row`` of ``source``; ``grads`` (L, P) holds each lane's own."""

    source: Slab | None = None
    row: int = 0

    @staticmethod
    def of(source: Slab, row: int, count: int) -> Lanes:
        """``count`` lanes of one adapter."""
        grads = torch.zeros(count, len(source.flat(row)), device=source.values.device)  # contiguous: ranks add them up in place
        named = [source.specs[row]] * count, [source.names[row]] * count
        return Lanes(source.parts, source.dropout, source.values[row : row + 1], grads, source.spans, *named, source=source, row=row)

    def split(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The tensor ``name``, (L, ...)."""
        return cast(Tensor, Split.apply(parameter, self.sink(name)))  # type: ignore[no-untyped-call]

    def share(self, picks: Sequence[int]) -> Share:
        """The share by which unit (row or token) u goes through lane ``picks[u]``."""
        return Share(self, pairs_of_rows(picks, self.capacity, self.values.device))
