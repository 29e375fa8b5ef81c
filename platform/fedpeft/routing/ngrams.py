"""How a task's texts are spelled: counts of character n-grams, which are sums, and how much likelier they make a text than all tasks' do.

Embeddings tell what a text speaks of; many know neither case nor line ends, and word problems of two kinds are alike to them. A task's
n-grams have the shares ``p``, its own counts with `PRIOR` more that lie as those of all tasks do (``q``: Dirichlet smoothing, MacKay and
Peto 1995, doi 10.1017/S1351324900000218). A text's likelihood ratio (Ren et al. 2019, arXiv 1906.02845) is the sum of ``log p / q`` over
its n-grams. Shape legend: N texts, E tasks, B buckets, M n-grams of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedpeft.bases.images import File, held
from fedpeft.errors import AdapterError
from fedpeft.routing.moments import BUCKETS, Exact, Measure

NGRAMS = "text.ngrams"
"""The counter of `counted`."""
ORDER, LONGEST = 3, 1024
"""Characters of the longest n-gram, and of a text that are read."""
PRIOR = 8000.0
"""Shares of all tasks count as much as this many n-grams of the task: those of about fifty short texts."""
START, END = "\x02", "\x03"


def places(text: str) -> NDArray[np.int64]:
    """The bucket of every n-gram (M,) of 1 to `ORDER` characters of ``text`` between two marks: MurmurHash3's finish of a polynomial."""
    codes = np.frombuffer((START + text[:LONGEST] + END).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)
    found, rolled = [], np.zeros(len(codes) + 1, np.uint32)
    for size in range(1, min(ORDER, len(codes)) + 1):
        rolled = rolled[:-1] * np.uint32(0x9E3779B1) + codes[size - 1 :] + np.uint32(1)
        found.append(_mixed(rolled + np.uint32(size)))
    return (np.concatenate(found) % BUCKETS).astype(np.int64)


def counted(texts: Iterable[str]) -> Exact:
    """How many n-grams of ``texts`` lie in each bucket (B,); of images none, as a file's name may be a person's."""
    found = np.zeros(BUCKETS)
    for text in texts:
        if isinstance(text, File) or held(text):
            continue
        found += np.bincount(places(text), minlength=BUCKETS)
    return found


@dataclass(frozen=True, eq=False)
class Spellings:
    """Log-shares of n-grams of tasks and of all of their pools, both (E, B), and the mean of their difference on a task's own (E,)."""

    own: Exact
    pool: Exact
    expected: Exact

    @staticmethod
    def of(measures: Sequence[Measure]) -> Spellings:
        """Of tasks that were counted. Raises `AdapterError` for others."""
        if not all(map(spelled, measures)):
            raise AdapterError("n-grams: a task was not counted; its sites run an older version, or routing.ngrams is off")
        counts = np.stack([np.maximum(one.own.ngrams, 0.0) for one in measures])
        every = np.stack([np.maximum(one.pool.ngrams, 0.0) for one in measures]) + 1.0
        pool = every / every.sum(axis=1, keepdims=True)
        totals = counts.sum(axis=1, keepdims=True)
        logs = np.log((counts + PRIOR * pool) / (totals + PRIOR)), np.log(pool)
        return Spellings(*logs, (counts / totals * (logs[0] - logs[1])).sum(axis=1))

    def read(self, texts: Sequence[str]) -> tuple[Exact, Exact]:
        """Of each text and task the log-likelihood and the excess, both (N, E).

        The excess is ``(R - M expected) / sqrt(M)``, R the likelihood ratio: for M independent n-grams of the task its mean is 0 and its
        variance that of one, however long the text.
        """
        pairs = [self._read(places(text)) for text in texts]
        shape = (len(texts), len(self.expected))
        return np.reshape([likely for likely, _ in pairs], shape), np.reshape([excess for _, excess in pairs], shape)

    def _read(self, found: NDArray[np.int64]) -> tuple[Exact, Exact]:
        likely, count = self.own[:, found].sum(axis=1), len(found)
        return likely, (likely - self.pool[:, found].sum(axis=1) - count * self.expected) / np.sqrt(count)


@lru_cache(maxsize=8)
def spellings(measures: tuple[Measure, ...]) -> Spellings:
    """As `Spellings.of`; kept, since routers are made anew for every request."""
    return Spellings.of(measures)


def spelled(measure: Measure) -> bool:
    """Whether n-grams of the task and of all tasks were counted."""
    return all(part.ngrams.size > 0 and part.ngrams.sum() > 0.0 for part in (measure.own, measure.pool))


def _mixed(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))
