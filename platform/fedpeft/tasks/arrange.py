"""Order, grouping and choice of examples: pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.tasks.images import Images
from fedpeft.tasks.protocol import Encoded

WINDOW = 32
"""Batches per window inside which examples are sorted by length: little padding, much shuffling."""

Places = NDArray[np.int64]


def shuffled(count: int, size: int, seed: int, epoch: int) -> Iterator[Places]:
    """Indices 0..count-1 in an order that (seed, epoch) decides, ``size`` at a time."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    yield from (order[start : start + size] for start in range(0, count, size))


def bucketed(lengths: Places, size: int, seed: int, epoch: int) -> Iterator[Places]:
    """As `shuffled`, but the examples of a batch are of similar length (N,), and the batches come in random order."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    windows = [order[start : start + size * WINDOW] for start in range(0, len(order), size * WINDOW)]
    ordered = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
    batches = [window[start : start + size] for window in ordered for start in range(0, len(window), size)]
    yield from (batches[place] for place in rng.permutation(len(batches)))


def by_length(lengths: Places, size: int) -> Iterator[Places]:
    """All indices from the shortest example to the longest, ``size`` at a time: the order of evaluation."""
    order = np.argsort(lengths, kind="stable")
    yield from (order[start : start + size] for start in range(0, len(order), size))


def subset(data: Encoded, places: Places, indexed: bool) -> Encoded:
    """The examples ``places`` (in ascending order) of ``data``; ``indexed``: a label is a place among the sequences, not a class."""
    chosen = np.flatnonzero(np.isin(data.owners, places))
    labels = data.labels[places]
    return replace(
        data,
        ids=data.ids.take(chosen.tolist()) if isinstance(data.ids, Images) else tuple(data.ids[place] for place in chosen.tolist()),
        labels=np.searchsorted(chosen, labels) if indexed else labels,
        starts=data.starts[chosen],
        owners=np.searchsorted(places, data.owners[chosen]),
        references=tuple(data.references[place] for place in places) if data.references else (),
    )
