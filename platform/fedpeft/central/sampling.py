"""Which examples make up each optimizer step: a function of seed and step alone, so the same on any number of ranks.

Every step holds each task's share of examples, at least one of each, and remainders are carried over, so that in the long run the shares
are exact. A task's examples come in an order of their own, each once before any comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fedpeft.central.pool import Places, Pool
from fedpeft.errors import ConfigError
from fedpeft.training.mixing import Mixing

Going = Callable[[int], NDArray[np.bool_]]
"""Which tasks (T,) take part in a step, by its number."""

BLOCK = 1 << 16
"""Up to so many examples are shuffled in memory; more are numbered through, so many at a time."""
ROUNDS = 6


def shares_of(pool: Pool, mixing: Mixing) -> dict[str, float]:
    """The share of each task. Raises `ConfigError` when it is 0 for one."""
    sizes = {name: len(data) for name, data in zip(pool.names, pool.data, strict=True)}
    shares = mixing.shares(sizes)
    none = sorted(name for name, share in shares.items() if share <= 0)
    if none:
        raise ConfigError(f"mixing: tasks {none} have share 0; leave them out of [tasks], or give them a share above 0")
    return shares


def windows(pool: Pool, shares: Mapping[str, float], size: int, seed: int, going: Going | None = None) -> Iterator[Places]:
    """The ``size`` examples, no fewer than tasks, of each optimizer step.

    They end when no task is ``going`` any more, whose shares the others take.
    """
    rng = np.random.default_rng([seed, len(pool.names)])
    queues = [_examples(pool, task, seed) for task in range(len(pool.names))]
    wanted, owed = np.array([shares[name] for name in pool.names]) * size, np.zeros(len(pool.names))
    for number in count():
        left = np.ones(len(owed), np.bool_) if going is None else going(number)
        if not left.any():
            return
        owed = np.where(left, owed + wanted * (1.0 if left.all() else size / wanted[left].sum()), 0.0)
        counts = _whole(owed, size, left)
        owed -= counts
        picks = np.array([next(queue) for queue, several in zip(queues, counts, strict=True) for _ in range(several)], np.int64)
        yield rng.permutation(picks)


def dealt(pool: Pool, picks: Places, ranks: int) -> list[Places]:
    """``picks`` in ``ranks`` equally many, of about equally many tokens: from the longest on, to and fro."""
    order = picks[np.argsort(-pool.lengths_of(picks), kind="stable")].reshape(-1, ranks)
    order[1::2] = order[1::2, ::-1]
    return list(order.T)


def _whole(owed: NDArray[np.float64], size: int, left: NDArray[np.bool_]) -> Places:
    """Whole numbers near ``owed`` that sum to ``size``, each at least 1 where ``left``, else 0: the largest remainders are rounded up."""
    counts = np.where(left, np.maximum(np.floor(owed), 1), 0).astype(np.int64)
    while counts.sum() != size:
        gap = np.where(left, owed - counts, -np.inf)
        if counts.sum() < size:
            counts[int(gap.argmax())] += 1
        else:
            counts[int(np.where(counts > 1, gap, np.inf).argmin())] -= 1
    return counts


def _examples(pool: Pool, task: int, seed: int) -> Iterator[int]:
    first, size = int(pool.firsts[task]), len(pool.data[task])
    for epoch in count():
        for places in _order(size, np.random.default_rng([seed, epoch, task])):
            yield from (first + places).tolist()


def _order(size: int, rng: np.random.Generator) -> Iterator[Places]:
    """0 to ``size`` - 1 in an order that ``rng`` decides, some at a time.

    Many are not shuffled, which would hold all of them, but numbered through a permutation: a Feistel network (Luby & Rackoff 1988) on the
    next larger even number of bits, walked on while it leaves the range (Black & Rogaway 2002, section 3).
    """
    if size <= BLOCK:
        yield rng.permutation(size)
        return
    half = -(-(size - 1).bit_length() // 2)
    keys = rng.integers(0, 1 << 63, ROUNDS, np.uint64)
    for start in range(0, size, BLOCK):
        places = np.arange(start, min(start + BLOCK, size), dtype=np.uint64)
        outside = np.ones(len(places), bool)
        while outside.any():
            places[outside] = _feistel(places[outside], keys, half)
            outside = places >= size
        yield places.astype(np.int64)


def _feistel(places: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    """A permutation of the numbers of 2 ``half`` bits; its rounds are those of SplitMix64 (Steele et al. 2014)."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = places >> bits, places & mask
    for key in keys:
        mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed >> np.uint64(31)) & mask)
    return left << bits | right
