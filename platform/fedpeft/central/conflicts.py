"""Conflict between tasks over a shared adapter: cosines of their gradients, and PCGrad on that adapter alone.

Adapters of single tasks have no part in it: nobody else asks anything of them. All of it works on the inner products of the tasks'
gradients, (T, T) in float64, which are the same numbers on every rank. Shape legend: T tasks, P values of the shared adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.central.joint import Joint
from fedpeft.central.moments import set_gradient
from fedpeft.central.together import add_up
from fedpeft.central.world import World
from fedpeft.mixtures.bank import SHARED

Handling = Literal["ignore", "report", "pcgrad"]
Gram = NDArray[np.float64]


def cosines(gram: Gram) -> Gram:
    """(T, T) from inner products; 0 beside a gradient of zeros."""
    lengths = np.sqrt(np.diag(gram))
    scale = np.outer(lengths, lengths)
    return np.asarray(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0))


def projected(gram: Gram, orders: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """PCGrad (Yu et al. 2020, arXiv 2001.06782, algorithm 1) as coefficients (T,): the new gradient is their sum over the tasks' own.

    Each task's gradient loses, one after the other in its order of ``orders``, what points against another task's original one.
    """
    own = np.eye(len(gram))
    for task, order in enumerate(orders):
        for other in order:
            inner = float(own[task] @ gram[:, other])
            if other != task and inner < 0:
                own[task, other] -= inner / gram[other, other]
    return np.asarray(own.sum(0))


class Conflicts:
    """The shared adapter's gradients by task during a job; all ranks call `settle` together."""

    def __init__(self, live: Joint, handling: Handling, world: World, seed: int) -> None:
        self.live, self.handling, self.world, self.seed = live, handling, world, seed
        self.sinks = live.split()
        self.cosines: dict[str, float] = {}

    def settle(self, zero: Any, number: int) -> None:
        """Take note of the cosines of step ``number``; with PCGrad, give the engine the shared adapter's new gradient before it steps."""
        add_up(self.world, self.sinks)
        self.sinks /= self.world.size
        gram = (self.sinks.double() @ self.sinks.double().t()).cpu().numpy()
        if not np.isfinite(gram).all():  # the step overflows and is left out
            self.cosines = {}
            self.sinks.zero_()
            return
        self.cosines = self._named(cosines(gram))
        if self.handling == "pcgrad":
            dice = np.random.default_rng([self.seed, number, len(gram)])
            found = projected(gram, [dice.permutation(len(gram)).tolist() for _ in gram])
            if (found != 1.0).any():
                self._write(zero, torch.from_numpy(found).to(self.sinks) @ self.sinks)
        self.sinks.zero_()

    def _named(self, table: Gram) -> dict[str, float]:
        names = self.live.pool.names
        return {f"{a}|{b}": float(table[i, j]) for i, a in enumerate(names) for j, b in enumerate(names) if i < j}

    def _write(self, zero: Any, gradient: torch.Tensor) -> None:
        """Heads keep theirs: rows answer through their own task's."""
        layout = self.live.specs[SHARED].layout
        for entry in layout.entries:
            if entry.role != "head":
                set_gradient(zero, self.live.bank.parameters(SHARED)[entry.name], gradient[layout.spans[entry.name]].view(entry.shape))
