"""Poisson sampling: each example comes into a step by a coin of its own, thrown in secret.

Amplification by sampling is proven for this and no other way of drawing (Abadi et al. 2016, arXiv 1607.00133; Mironov et al. 2019,
arXiv 1908.10530), and only against those who do not know who was drawn. So the coins come from a keystream without a seed, and an
epoch, an order or a fixed batch size do not exist here.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.tasks.arrange import subset

if TYPE_CHECKING:
    from fedpeft.tasks import Batch, Encoded, Task

Places = NDArray[np.int64]


class Source(Protocol):
    """What `SecureNoise` gives, of which production takes no other kind."""

    def words(self, size: int) -> NDArray[np.uint64]:
        """Uniform 64-bit words (size,)."""

    def rounded(self, size: int, sigma: float) -> NDArray[np.int64]:
        """Integers (size,) of N(0, sigma^2), rounded to the nearest."""

    def chosen(self, size: int, rate: float) -> NDArray[np.bool_]:
        """Which of ``size`` take part, each with probability ``rate``."""


def batches_of(task: Task, data: Encoded, places: Places, size: int) -> Iterator[Batch]:
    """The examples ``places`` of ``data`` in batches of about ``size``: how they are cut changes nothing, since each counts by itself."""
    if not len(places):
        return
    parts = max(1, round(len(places) / size))
    for part in np.array_split(places, parts):
        yield from _fitting(task, data, part)


def _fitting(task: Task, data: Encoded, places: Places) -> Iterator[Batch]:
    """One batch, or several where a packed row would be longer than the task runs at once."""
    from fedpeft.tasks.likelihood import PACK

    part = subset(data, places, task.head.kind == "lm")
    (batch,) = task.batches(part, len(part), 0, 0)
    if "position_ids" in batch.inputs and batch.tokens > PACK and len(places) > 1:
        for half in np.array_split(places, min(len(places), max(2, ceil(batch.tokens / PACK)))):
            yield from _fitting(task, data, half)
    else:
        yield batch
