"""Rows held out of training, and the losses on them that balancing by convergence and early stops look at."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.central.pool import Places, Pool
from fedpeft.central.together import add_up
from fedpeft.central.world import World
from fedpeft.errors import DataError
from fedpeft.tasks.protocol import Row
from fedpeft.tasks.split import lowest
from fedpeft.training.modes import evaluating

SHARE = 5
"""At most one training row in so many is held out."""


def held_out(name: str, rows: Iterable[Row], most: int) -> frozenset[int]:
    """Numbers of at most ``most`` of ``rows``, and at most a fifth, chosen by hash; the rows are gone through once and not kept.

    Raises:
        DataError: there are too few to hold one out.
    """
    numbers = count()
    found = lowest((row for row, _ in zip(rows, numbers, strict=False)), most)
    total = next(numbers)
    if total < SHARE:
        raise DataError(
            f"task {name}: {total} training rows, of which [validation] holds out a fifth; give {SHARE} or more, or leave it out"
        )
    return frozenset(found[: total // SHARE])


def held_losses(zero: Any, model: nn.Module, pool: Pool, size: int, world: World) -> NDArray[np.float64]:
    """Mean loss (T,) of each task of ``pool``; a collective of all ranks, which call the model equally often, ``size`` rows at a time."""
    sums = torch.zeros(len(pool.names), dtype=torch.float64, device=world.device)
    with evaluating(model), torch.no_grad():
        for picks in _chunks(pool, size):
            own = picks[world.rank :: world.size]
            found = zero(pool.part(own if len(own) else picks[:1]))
            sums += found.double() * bool(len(own))
    add_up(world, sums)
    return sums.cpu().numpy() / np.maximum(pool.counts(_every(pool)), 1)


def _chunks(pool: Pool, size: int) -> list[Places]:
    """All examples, from the longest on."""
    every = _every(pool)
    order = every[np.argsort(-pool.lengths_of(every), kind="stable")]
    return [order[start : start + size] for start in range(0, len(order), size)]


def _every(pool: Pool) -> Places:
    return np.arange(pool.firsts[-1])
