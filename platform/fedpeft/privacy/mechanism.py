"""Client-level differential privacy of one release: a site's vector of bounded norm, the sum of them noised, what it reads as.

Deltas, counters and the bit of adaptive clipping are one vector with one norm and one noise, hence one event, whatever of them
travels. Weights are uniform: a site's examples would be one more thing to hide, and would move its sensitivity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, sqrt
from typing import Any

import numpy as np

from fedpeft.errors import PrivacyError
from fedpeft.privacy.accounting import Event, sum_of_discrete
from fedpeft.privacy.clipping import Values, bounded, clipped, norm
from fedpeft.privacy.noise import SecureNoise, check_secure
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import WORD, Counters, Grid, Update

SIDE = "~side"
"""Role of what travels beside the delta under noise; '~' sorts behind every role of an adapter."""
BIT = f"{SIDE}~inside"
"""Sorts behind the counters."""
ROOM = 12.0
"""Standard deviations of its own noise for which a site's codes have room; beyond 12 lies less than 10^-32 of it."""


@dataclass(frozen=True)
class Bounded:
    """A counter that is released: its number of values, and the largest size of one site's value."""

    length: int
    limit: float


@dataclass(frozen=True)
class Mechanism:
    """How one task's sum of one round is noised; the same for every site and the coordinator.

    ``noise``: standard deviation over sensitivity. ``clip`` bounds the delta's norm, and ``side`` is the share of the squared
    sensitivity that counters and bit take, if there are any; 1 where nothing but counters travels. ``sites`` is the largest
    cohort. ``shares`` 0: the coordinator adds the noise; else every site adds so much that ``shares`` of them make the whole.
    ``rate``: secret Poisson sampling; the sum is then divided by the cohort that is to be expected, else by the one there was.
    ``bits`` are those of the ring of the sum: in few, delta and noise share a coarse grid, to which values are rounded by secret dice.

    Raises:
        PrivacyError: numbers that protect nothing, or that contradict one another.
    """

    noise: float
    clip: float
    sites: int
    shares: int = 0
    side: float = 0.0
    counters: Mapping[str, Bounded] = field(default_factory=dict)
    adaptive: bool = False
    rate: float = 1.0
    bits: int = WORD

    def __post_init__(self) -> None:
        numbers = 0 < self.noise < inf and 0 < self.clip < inf and 0 <= self.side <= 1 and 0 < self.rate <= 1
        if not numbers or not 0 <= self.shares <= self.sites or self.sites < 1:
            raise PrivacyError(f"privacy: impossible mechanism {self.to_json()}; noise and clip are positive, shares at most sites")
        if self.rate < 1 and self.shares:
            raise PrivacyError("privacy: sampling gains nothing where sites add the noise; use rate = 1 or kind = 'central'")
        if bool(self.counters or self.adaptive) != (self.side > 0):
            raise PrivacyError(f"privacy: side = {self.side} with {len(self.counters)} counters; what travels beside needs its share")

    @property
    def sensitivity(self) -> float:
        """The largest norm of what one site sends."""
        return self.clip if self.side == 1 else self.clip / sqrt(1 - self.side)

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise of the sum."""
        return self.noise * self.sensitivity

    @property
    def own(self) -> float:
        """The standard deviation of one site's noise."""
        return self.deviation / sqrt(self.shares) if self.shares else 0.0

    @cached_property
    def grid(self) -> Grid:
        """The fixed-point grid with room for the noise: of a site's codes, or of the coordinator's sampler."""
        reach = self.sensitivity * (1 if self.shares else max(1.0, self.noise / self.sites)) + ROOM * self.own
        return Grid(self.sites, reach, self.bits)

    @property
    def unit(self) -> float:
        """What a counter at its limit is in the vector."""
        places = sum(one.length for one in self.counters.values()) + self.adaptive
        return self.sensitivity * sqrt(self.side / places) if places else 0.0

    def layout(self, travels: Layout) -> Layout:
        """The layout of the vector: ``travels`` and what goes beside it."""
        beside = [Entry(SIDE, f"{SIDE}.{name}", (one.length,)) for name, one in sorted(self.counters.items())]
        return Layout.of([*travels.entries, *beside, *([Entry(SIDE, BIT, (1,))] if self.adaptive else [])])

    def event(self, size: int) -> Event:
        """What releasing a vector of ``size`` values costs. Raises `PrivacyError` where the grid is too coarse for the noise."""
        if not self.shares:
            return Event(self.noise, self.rate)
        return Event(sum_of_discrete(self.noise, self.own / self.grid.step, self.shares, size), concentrated=True)

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back."""
        plain = {name: getattr(self, name) for name in ("noise", "clip", "sites", "shares", "side", "adaptive", "rate", "bits")}
        return {**plain, "counters": {name: [one.length, one.limit] for name, one in self.counters.items()}}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Mechanism:
        """Inverse of `to_json`. Raises `PrivacyError` on anything else."""
        try:
            counters = {str(name): Bounded(int(length), float(limit)) for name, (length, limit) in table["counters"].items()}
            noise, clip, side, rate = (float(table[name]) for name in ("noise", "clip", "side", "rate"))
            sites, shares, bits = (int(table[name]) for name in ("sites", "shares", "bits"))
            return Mechanism(noise, clip, sites, shares, side, counters, bool(table["adaptive"]), rate, bits)
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise PrivacyError(f"privacy: a mechanism cannot be read ({fault}); do both sides run one version?") from None


def check_shares(mechanism: Mechanism, least: int) -> None:
    """Site: refuse to send under masks that open with fewer survivors than carry the noise.

    ``least`` is the masks' own quorum, without those who may collude.

    Raises:
        PrivacyError: the coordinator asked every site for too little noise.
    """
    if mechanism.shares > least:
        raise PrivacyError(
            f"privacy: noise is divided among {mechanism.shares} sites, the masks open with {least} honest ones; nothing is sent: "
            "the coordinator must raise the quorum or divide less"
        )


@dataclass(frozen=True)
class Released:
    """What a noised sum says: the mean delta, noised sums of counters, and the noised share of sites inside the clip (None: not asked)."""

    mean: Tensors
    counters: Counters
    inside: float | None


def protect(delta: Tensors, counters: Counters, mechanism: Mechanism, source: SecureNoise) -> Update:
    """A site's update: clipped, uniform weight, counters inside the vector, its share of the noise where sites add it.

    ``delta`` may be of an empty layout. Counters that the mechanism does not name are left out.

    Raises:
        PrivacyError: the delta is not finite, a counter is missing or of another length, or ``source`` is no `SecureNoise`.
    """
    check_secure(source)
    vector = np.concatenate([clipped(delta.flat, mechanism.clip), _beside(delta, counters, mechanism)])
    layout, grid = mechanism.layout(delta.layout), mechanism.grid
    codes = bounded(vector / grid.step, mechanism.sensitivity / grid.step, np.rint if grid.bits == WORD else _dice(source))
    if mechanism.shares:
        codes = codes + source.discrete(len(codes), mechanism.own / grid.step)
    return Update(layout, grid, np.clip(codes, -grid.limit, grid.limit).astype(np.int32), 1.0)


def _dice(source: SecureNoise) -> Callable[[Values], Values]:
    """Rounding to either neighbour, so that the mean is the value."""
    return lambda values: np.floor(values + (source.words(len(values)) >> np.uint64(11)) * 2.0**-53)


def release(total: Update, mechanism: Mechanism, source: SecureNoise) -> Released:
    """What may be released of the sum ``total``; the coordinator's noise is added here where sites added none.

    Draw once: keep the result before it goes anywhere, since a second draw over the same sum halves the noise.

    Raises:
        PrivacyError: the sum is of another mechanism, weights are not uniform, survivors are too few to carry the noise, or
            ``source`` is no `SecureNoise`.
    """
    check_secure(source)
    check_sum(total, mechanism)
    codes = total.codes.astype(np.float64)
    if not mechanism.shares:
        codes += source.rounded(len(codes), mechanism.deviation / total.grid.step)
    travels = Layout(tuple(entry for entry in total.layout.entries if entry.role != SIDE))
    values = codes * total.grid.step
    count = mechanism.rate * mechanism.sites if mechanism.rate < 1 else total.count
    mean = Tensors(travels, (values[: travels.size] / count).astype(np.float32))
    return Released(mean, *_read(values[travels.size :], mechanism, count))


def check_sum(total: Update, mechanism: Mechanism) -> None:
    """Raise `PrivacyError` unless ``total`` is a sum over sites that were protected by ``mechanism``, enough of them to carry its noise."""
    if total.grid != mechanism.grid or total.counters or total.weight != total.count:
        raise PrivacyError("privacy: the sum is of another grid, or has weights or counters in the clear; was it protected for this round?")
    least = mechanism.shares or int(mechanism.rate == 1)
    if not least <= total.count <= mechanism.sites:
        raise PrivacyError(
            f"privacy: a sum over {total.count} sites, {least} to {mechanism.sites} carry the noise that was promised; drop the round"
        )
    beside = mechanism.layout(Layout(())).entries
    if tuple(entry for entry in total.layout.entries if entry.role == SIDE) != beside:
        raise PrivacyError("privacy: the sum holds other counters than the mechanism; do both sides run one plan?")


def _beside(delta: Tensors, counters: Counters, mechanism: Mechanism) -> Values:
    """Counters over their limits, each cut to [-1, 1], and the bit as -1 or 1; times the unit."""
    parts: list[Any] = []
    for name, one in sorted(mechanism.counters.items()):
        values = np.asarray(counters.get(name, ()), np.float64)
        if len(values) != one.length or not np.isfinite(values).all():
            raise PrivacyError(f"privacy: counter {name!r} has {len(values)} finite values, the mechanism {one.length}")
        parts.append(np.clip(values / one.limit, -1, 1))
    if mechanism.adaptive:
        parts.append([1.0 if norm(delta.flat) <= mechanism.clip else -1.0])
    return np.concatenate([np.zeros(0), *parts]) * mechanism.unit


def _read(values: Values, mechanism: Mechanism, count: float) -> tuple[Counters, float | None]:
    found, start = {}, 0
    for name, one in sorted(mechanism.counters.items()):
        found[name] = tuple(float(value) * one.limit / mechanism.unit for value in values[start : start + one.length])
        start += one.length
    if not mechanism.adaptive:
        return found, None
    return found, min(max((float(values[-1]) / mechanism.unit / count + 1) / 2, 0.0), 1.0)
