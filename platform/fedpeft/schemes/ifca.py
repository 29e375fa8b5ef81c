"""Tasks that nobody declared: a site takes the cluster whose adapter loses least on its rows (IFCA, Ghosh et al. 2020, arXiv 2006.04088).

The clusters of ``chat`` are the tasks ``chat.0``, ``chat.1``, ...: one form, one set of rows at each site, adapters of their own. Which
one a site takes is all that it says; losses stay with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import isclose, isfinite

from fedpeft.errors import UpdateError

TIE = 1e-6
"""Losses that differ by a smaller share are equal: at the start every cluster answers as the base does."""


def names(task: str, count: int) -> tuple[str, ...]:
    """The ``count`` clusters of ``task``."""
    return tuple(f"{task}.{place}" for place in range(count))


def is_cluster(name: str, task: str) -> bool:
    """Whether ``name`` is a cluster of ``task``."""
    head, _, place = name.rpartition(".")
    return head == task and place.isdecimal()


def choose(losses: Mapping[str, float], site: str) -> str:
    """The cluster of the least loss; among equals one that the ``site``'s name picks, so that sites spread over the clusters at first.

    Raises:
        UpdateError: there is none whose loss is finite.
    """
    finite = {name: loss for name, loss in sorted(losses.items()) if isfinite(loss)}
    if not finite:
        raise UpdateError(f"clusters {sorted(losses)}: no loss is finite; look for broken rows")
    least = min(finite.values())
    equal = [name for name, loss in finite.items() if isclose(loss, least, rel_tol=TIE)]
    return min(equal, key=lambda name: hashlib.sha256(f"{site}\0{name}".encode()).digest())
