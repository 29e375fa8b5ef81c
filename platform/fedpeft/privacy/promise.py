"""What a plan says of privacy: how a site protects its answer, and what the coordinator promises for the whole run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from fedpeft.errors import PrivacyError
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.settings import Client, Example

LONGEST = 1 << 20
"""Rounds over which a budget may be spread."""


@dataclass(frozen=True)
class Whole:
    """A whole site is protected: its vector leaves by ``mechanism``; the task may spend ``epsilon`` at ``delta`` in the run."""

    epsilon: float
    delta: float
    mechanism: Mechanism


@dataclass(frozen=True)
class Single:
    """Single rows are protected: the site trains by DP-SGD with gradients of norm ``clip``, its budget spread over ``rounds``.

    ``evaluation`` answers do not exist under it, since nothing protects held-out rows.
    """

    epsilon: float
    delta: float
    clip: float
    rounds: int

    @property
    def settings(self) -> Example:
        """The settings that it came from."""
        return Example(self.epsilon, self.delta, self.clip)


Promise = Whole | Single


def whole(settings: Client, mechanism: Mechanism) -> Whole:
    """The promise of one answer by ``mechanism``."""
    return Whole(settings.epsilon, settings.delta, mechanism)


def single(settings: Example, rounds: int) -> Single:
    """The promise of a run of ``rounds``."""
    return Single(settings.epsilon, settings.delta, settings.clip, rounds)


def dumps(promise: Promise) -> str:
    """A JSON form that `loads` reads back; equal for equal promises."""
    if isinstance(promise, Whole):
        table: dict[str, Any] = {"epsilon": promise.epsilon, "delta": promise.delta, "mechanism": promise.mechanism.to_json()}
    else:
        table = asdict(promise)
    return json.dumps(table, sort_keys=True)


def loads(text: str) -> Promise:
    """Inverse of `dumps`. Raises `PrivacyError` on anything else."""
    try:
        table = json.loads(text)
        kind = Whole if "mechanism" in table else Single
        if not isinstance(table, dict) or set(table) != set(kind.__dataclass_fields__):
            raise ValueError(f"keys {sorted(table)[:8]}, needed are {sorted(kind.__dataclass_fields__)}")
        promise = _whole(table) if kind is Whole else _single(table)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as fault:
        raise PrivacyError(f"privacy: what the plan promises cannot be read ({fault}); do both sides run one version?") from None
    if not (promise.epsilon > 0 and isfinite(promise.epsilon) and 0 < promise.delta < 1):
        raise PrivacyError(f"privacy: epsilon {promise.epsilon} at delta {promise.delta} is no budget; delta is in (0, 1)")
    return promise


def _whole(table: Mapping[str, Any]) -> Whole:
    return Whole(float(table["epsilon"]), float(table["delta"]), Mechanism.from_json(table["mechanism"]))


def _single(table: Mapping[str, Any]) -> Single:
    found = Single(float(table["epsilon"]), float(table["delta"]), float(table["clip"]), int(table["rounds"]))
    if not (found.clip > 0 and isfinite(found.clip) and 1 <= found.rounds <= LONGEST):
        raise PrivacyError(f"privacy: clip {found.clip} over {found.rounds} rounds; clip is positive, rounds from 1 to {LONGEST}")
    return found
