"""Label skew: who holds which rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


def dirichlet(labels: Places, sites: int, alpha: float, seed: int) -> tuple[Places, ...]:
    """Deal the rows of each label out to ``sites`` by shares from Dirichlet(alpha, ..., alpha) (Hsu et al. 2019, arXiv 1909.06335).

    Labels are drawn again until every site has at least 1 % of an equal share.
    """
    rng = np.random.default_rng(seed)
    least = max(len(labels) // (100 * sites), 8)
    while True:
        found: list[list[Places]] = [[] for _ in range(sites)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(sites, alpha)))[:-1] * len(rows)).round().astype(int)
            for site, part in zip(found, np.split(rows, cuts), strict=True):
                site.append(part)
        parts = tuple(np.sort(np.concatenate(site)) for site in found)
        if min(map(len, parts)) >= least:
            return parts
