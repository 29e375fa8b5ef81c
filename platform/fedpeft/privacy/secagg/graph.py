"""Who masks with whom: every pair in small cohorts, a regular graph whose degree grows with log n in large ones.

After Bell et al. 2020 (Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, eprint 2020/704).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma, log2

from fedpeft.errors import PrivacyError

SECURITY_BITS = 40
"""A graph that exposes a site is drawn with probability below 2^-40."""
FAILURE_BITS = 20
"""A round is lost, although no more sites dropped than foreseen, with probability below 2^-20."""
LEAST = 3


@dataclass(frozen=True)
class Shape:
    """Degree of the graph, shares that open a secret, and signatures on the survivors that a site must see (``quorum``).

    ``quorum`` counts over all sites where the graph is complete, else over a site's neighbours and itself.
    """

    sites: int
    degree: int
    threshold: int
    quorum: int

    @property
    def complete(self) -> bool:
        """Whether all pairs are neighbours."""
        return self.degree == self.sites - 1


@lru_cache(maxsize=256)
def shape(sites: int, colluding: float = 0.1, dropping: float = 0.2) -> Shape:
    """The smallest graph, or nearly, that is safe while ``colluding`` help the coordinator, and finishes while ``dropping`` vanish.

    Any two quorums have an honest member in common, which signs one set of survivors only; so no two sets are opened.

    Raises:
        PrivacyError: fewer than 3 sites, or shares that leave no quorum.
    """
    if sites < LEAST:
        raise PrivacyError(
            f"secure aggregation: {sites} site(s); below {LEAST} the sum shows what each one sent, so it is refused; "
            "gather more sites, or set secure_aggregation.enabled = false where the coordinator is trusted"
        )
    if colluding < 0 or dropping < 0 or colluding + 2 * dropping >= 1:
        raise PrivacyError(
            f"secure aggregation: colluding = {colluding:g} and dropping = {dropping:g} leave no quorum; "
            "colluding + 2 dropping must be below 1"
        )
    degrees = range(4, sites - 1, 2)
    place = bisect_left(degrees, True, key=lambda degree: _threshold(sites, degree, colluding, dropping) is not None)
    threshold = _threshold(sites, degrees[place], colluding, dropping) if place < len(degrees) else None
    if threshold is not None:
        return Shape(sites, degrees[place], threshold, threshold)
    quorum = (sites + int(colluding * sites)) // 2 + 1
    return Shape(sites, sites - 1, max(2, quorum - 1), quorum)


def enough(sites: int, dropping: float) -> int:
    """The fewest of ``sites`` over which their sum is opened when no more vanish than the share ``dropping``; never below 3."""
    return max(LEAST, sites - int(dropping * sites))


def neighbours(members: Sequence[str], degree: int, seed: bytes) -> dict[str, tuple[str, ...]]:
    """Each site's neighbours, by name: a circulant graph over an order that ``seed`` draws, so that nobody picks its own."""
    order = sorted(members, key=lambda name: hashlib.sha256(seed + b"\0" + name.encode()).digest())
    count = len(order)
    if degree >= count - 1:
        everyone = sorted(order)
        return {name: tuple(other for other in everyone if other != name) for name in everyone}
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {name: tuple(sorted(order[(place + step) % count] for step in steps)) for place, name in enumerate(order)}


def _threshold(sites: int, degree: int, colluding: float, dropping: float) -> int | None:
    """The least safe threshold at this degree, if the round then also finishes and honest survivors stay connected."""
    bad, gone = int(colluding * sites), int(dropping * sites)
    apart = log2(sites) + (degree // 2) * log2(max(colluding + dropping, 2.0**-60))
    if apart > -SECURITY_BITS:
        return None
    thresholds = range(degree // 2 + 1, degree + 1)
    place = bisect_left(
        thresholds, True, key=lambda one: sites * _tail(sites - 1, bad, degree, 2 * one - degree - 1) <= 2.0**-SECURITY_BITS
    )
    if place == len(thresholds):
        return None
    lost = sites * _tail(sites - 1, gone, degree, degree - thresholds[place] + 1)
    return thresholds[place] if lost <= 2.0**-FAILURE_BITS else None


def _tail(population: int, marked: int, draws: int, least: int) -> float:
    """P[X >= least] of a hypergeometric X."""
    total = _log_choose(population, draws)
    hits = range(max(least, 0, draws - population + marked), min(draws, marked) + 1)
    return sum(exp(_log_choose(marked, x) + _log_choose(population - marked, draws - x) - total) for x in hits)


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
