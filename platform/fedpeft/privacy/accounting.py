"""What releases cost: epsilon of composed events, and the noise that a budget needs, both answered by Google's `dp-accounting`.

Neighbours differ in whether one unit (a site, or an example) takes part: its contribution is there, or is zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from math import exp, inf, isfinite, log, pi, sqrt
from typing import Any

from fedpeft.errors import PrivacyError

LOOSE = 50.0
"""Above this epsilon nothing is protected anyway, and the tight accountant would take long to say so."""
BINS = 1e-3
"""Width of the bins of losses: the answer is an upper bound for any, at most 0.05 % above that of bins ten times finer."""
CLOSE = 1e-3
TINY = 1e-12
NOISIEST = 2.0**20
"""Largest noise multiplier that `calibrate` looks at."""
Point = tuple[float, float]
"""Logarithms of a noise multiplier and of what it costs over the target: nearly a straight line."""


@dataclass(frozen=True, order=True)
class Event:
    """``count`` noised sums: Gaussian noise of ``noise`` times the sensitivity, each unit taking part with probability ``rate``.

    ``rate`` below 1 holds only for secret Poisson sampling. ``concentrated``: the noise is a sum of discrete Gaussians, of which
    only concentrated differential privacy is known, (1 / noise)^2 / 2; neither sampling nor the tight accountant applies.

    Raises:
        PrivacyError: a number is out of range.
    """

    noise: float
    rate: float = 1.0
    count: int = 1
    concentrated: bool = False

    def __post_init__(self) -> None:
        if not (0.0 < self.noise < inf and 0.0 < self.rate <= 1.0 and self.count >= 1):
            raise PrivacyError(
                f"event: noise={self.noise}, rate={self.rate}, count={self.count}; noise must be positive, rate in (0, 1], count at least 1"
            )
        if self.concentrated and self.rate < 1.0:
            raise PrivacyError("event: no gain by sampling is proven for sums of discrete Gaussians; use rate = 1 or kind = central")

    def times(self, count: int) -> Event:
        """The same event ``count`` times as often."""
        return replace(self, count=self.count * count)

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        return dict(vars(self))

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Event:
        """Inverse of `to_json`. Raises `PrivacyError` on anything else."""
        kinds = {"noise": (int, float), "rate": (int, float), "count": (int,), "concentrated": (bool,)}
        wrong = sorted(set(table) ^ set(kinds)) or [
            name for name, kind in kinds.items() if not isinstance(table[name], kind) or (kind != (bool,) and isinstance(table[name], bool))
        ]
        if wrong:
            raise PrivacyError(f"event: {wrong} are missing, unknown or of another type; the keys are {sorted(kinds)}")
        return Event(**table)


def epsilon(events: Iterable[Event], delta: float) -> float:
    """The epsilon of all ``events`` together at ``delta``: the smaller of what the Rényi and the loss-distribution accountant say.

    Rényi: Mironov 2017 (arXiv 1702.07476), Mironov et al. 2019 (arXiv 1908.10530); loss distributions: Koskela et al. 2020
    (arXiv 1906.03049), Doroshenko et al. 2022 (arXiv 2207.04380), of Gaussian events only.

    Raises:
        PrivacyError: ``delta`` is outside (0, 1).
    """
    if not 0.0 < delta < 1.0:
        raise PrivacyError(f"accounting: delta {delta} is outside (0, 1); it should be below one over the number of units")
    return _epsilon(_grouped(events), delta)


def calibrate(events: Callable[[float], Sequence[Event]], target: float, delta: float) -> float:
    """The least noise multiplier z for which ``events(z)`` costs at most ``target``, or up to a thousandth more than the least.

    Raises:
        PrivacyError: ``target`` or ``delta`` is no budget, or no noise is enough.
    """
    if not (isfinite(target) and target > 0):
        raise PrivacyError(f"accounting: epsilon {target} is no budget; give a positive number (1 is strong, 8 is common)")

    def point(place: float) -> Point:
        return place, log(max(epsilon(events(exp(place)), delta), TINY) / target)

    quiet = loud = point(0.0)
    while loud[1] > 0:
        if loud[0] > log(NOISIEST):
            raise PrivacyError(f"accounting: no noise keeps {len(events(1.0))} kinds of releases within epsilon {target}; release less")
        quiet, loud = loud, point(loud[0] + log(2))
    while quiet[1] <= 0:
        quiet, loud = point(quiet[0] - log(2)), quiet
    for step in count(1):
        if loud[0] - quiet[0] <= CLOSE:
            break
        found = point(_between(quiet, loud) if step % 3 else (quiet[0] + loud[0]) / 2)
        quiet, loud = (quiet, found) if found[1] <= 0 else (found, loud)
    return exp(loud[0])


def sum_of_discrete(noise: float, deviation: float, sites: int, size: int) -> float:
    """The noise multiplier that ``sites`` discrete Gaussians of ``deviation`` steps each are worth, in ``size`` dimensions.

    Their sum is no discrete Gaussian: Kairouz, Liu and Steinke 2021 (arXiv 2102.06387) bound what that costs;
    ``noise`` is the deviation of the sum over the sensitivity. From half a dozen steps on it costs nothing that float64 shows.

    Raises:
        PrivacyError: ``deviation`` is below half a step, of which nothing is known.
    """
    if deviation < 0.5:
        raise PrivacyError(f"noise: a site's share of {deviation:.2g} steps is too coarse; at least 0.5 is needed: use a finer grid")
    gap = 10 * sum(exp(-2 * (pi * deviation) ** 2 * k / (k + 1)) for k in range(1, sites))
    return 1 / min(sqrt(1 / noise**2 + gap * size / 2), 1 / noise + gap * sqrt(size))


def _between(quiet: Point, loud: Point) -> float:
    """Where the line through both crosses the target, a little further from the nearer one: then the next two enclose the crossing."""
    width = loud[0] - quiet[0]
    share = quiet[1] / (quiet[1] - loud[1]) if isfinite(quiet[1]) else 0.5
    beyond = CLOSE / 3 / width * (1 if share < 0.5 else -1)
    return quiet[0] + width * min(max(share + beyond, 0.1 * CLOSE / width), 1 - 0.1 * CLOSE / width)


def _grouped(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal events as one, in an order of their own: the cost depends on nothing else."""
    counts: dict[Event, int] = {}
    for event in events:
        single = replace(event, count=1)
        counts[single] = counts.get(single, 0) + event.count
    return tuple(sorted(single.times(count) for single, count in counts.items()))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return 0.0
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every order that it leaves out, which only makes the answer larger
    loose = float(_composed(RdpAccountant(), events).get_epsilon(delta))
    if loose > LOOSE or any(event.concentrated for event in events):
        return loose
    return min(loose, float(_composed(PLDAccountant(value_discretization_interval=BINS), events).get_epsilon(delta)))


def _composed(accountant: Any, events: Sequence[Event]) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    for event in events:
        gaussian = GaussianDpEvent(event.noise)
        accountant.compose(gaussian if event.rate == 1.0 else PoissonSampledDpEvent(event.rate, gaussian), event.count)
    return accountant
