"""Second moments and n-grams of tasks' texts: asked for once, beside the centroid; what closeness is measured by ever after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.routing import BINS, MahalanobisRouter, Measure, Moments, RouterCard, pooled
from fedpeft.routing.closeness import CLOSENESS, TEXTED
from fedpeft.routing.moments import BUCKETS, MOMENTS, moments, packed, unpacked
from fedpeft.routing.ngrams import NGRAMS
from fedpeft.update import Counters
from fedpeft.wire.spreads import spread_message
from fedpeft.wire.v1.federation_pb2 import Spread
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.store import Store

Arrays = Mapping[str, NDArray[Any]]
NOTE = "moments"


@dataclass
class Spreads:
    """The moments of tasks by name, ``known`` by their digests in ``store``; the journal remembers which they are."""

    store: Store
    journal: Journal
    known: dict[str, str] = field(default_factory=dict)
    pool: Moments | None = None

    def __post_init__(self) -> None:
        self.known |= self.journal.notes().get(NOTE, {})

    @property
    def blobs(self) -> set[str]:
        """Digests in the store that are needed."""
        return set(self.known.values())

    def learn(self, counters: Mapping[str, Counters]) -> None:
        """Keep the moments of tasks that had none; sums that are none are passed over, and asked for no more."""
        fresh = {name: found for name, mine in counters.items() if name not in self.known and (found := _summed(mine)) is not None}
        if fresh:
            self.known |= {name: self.store.put_arrays(_arrays(found)) for name, found in fresh.items()}
            self.journal.note(NOTE, self.known)

    def told(self) -> dict[str, tuple[Spread, Spread]]:
        """For each task what sites need to say how near their rows are to it: its moments, and the ``pool`` of all tasks from now on."""
        mine = {name: _moments(self.store.arrays(digest)) for name, digest in self.known.items()}
        try:
            self.pool = pooled(mine.values())
        except AdapterError:
            return {}  # none is known yet
        shared = spread_message(self.pool)
        return {name: (spread_message(found), shared) for name, found in mine.items()}

    def kept(self, task: str, counters: Counters) -> str:
        """The digest of a task's moments, the pool's, and the histograms of closeness that sites counted by them; empty without one."""
        close = {name: found for name in (CLOSENESS, TEXTED) if (found := _counted(counters.get(name, ()), BINS)).size}
        if self.pool is None or task not in self.known or CLOSENESS not in close:
            return ""
        pool = {f"pool {name}": values for name, values in _arrays(self.pool).items()}
        return self.store.put_arrays({**self.store.arrays(self.known[task]), **pool, **close})


def added(card: RouterCard, arrays: Arrays) -> RouterCard:
    """``card`` with what `Spreads.kept` put into the store."""
    kinds = {MahalanobisRouter.kind: CLOSENESS, TEXTED: TEXTED}
    found = {kind: tuple(arrays[name].tolist()) for kind, name in kinds.items() if name in arrays}
    return replace(card, moments=Measure(_moments(arrays), _moments(arrays, "pool ")), counts={**card.counts, **found})


def _summed(counters: Counters) -> Moments | None:
    try:
        return replace(moments(counters.get(MOMENTS, ())), ngrams=_counted(counters.get(NGRAMS, ()), BUCKETS))
    except AdapterError:
        return None


def _counted(values: Sequence[float], size: int) -> NDArray[np.float64]:
    """``values`` where they are counts of ``size`` bins, else none."""
    found = np.array(values, np.float64)
    return found if found.shape == (size,) and np.isfinite(found).all() and (found >= 0.0).all() else np.zeros(0)


def _arrays(found: Moments) -> Arrays:
    return {
        "count": np.array([found.count]),
        "mean": found.mean.astype(np.float32),
        "triangle": packed(found.covariance).astype(np.float32),
        "ngrams": found.ngrams.astype(np.float32),
    }


def _moments(arrays: Arrays, prefix: str = "") -> Moments:
    count, mean, triangle = (arrays[f"{prefix}{name}"] for name in ("count", "mean", "triangle"))
    ngrams = arrays.get(f"{prefix}ngrams", np.zeros(0))
    return Moments(float(count[0]), mean.astype(np.float64), unpacked(triangle), ngrams.astype(np.float64))
