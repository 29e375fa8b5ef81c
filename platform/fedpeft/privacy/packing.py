"""An update as one vector of 32-bit codes, weight and counters included, so that masks hide all of it and sums stay exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.tensors import Layout
from fedpeft.update import COUNTER_LIMIT, COUNTER_STEP, WEIGHT_STEP, Counters, Grid, Update

Codes = NDArray[np.int32]

LIMB = 16
"""Bits of a counter that one code carries; the other 16 leave room for the sum over 2^15 sites."""
SITES = 1 << 15
LIMBS = 4
"""A counter is a multiple of 2^-20 below 2^32 in size: 53 bits with its sign."""


@dataclass(frozen=True)
class Schema:
    """What one vector holds: values of ``layout`` on ``grid``, the weight, and counters by name with their lengths."""

    layout: Layout
    grid: Grid
    counters: Mapping[str, int]

    @property
    def size(self) -> int:
        """Codes in a vector."""
        return self.layout.size + 1 + LIMBS * sum(self.counters.values())

    @property
    def digest(self) -> str:
        """SHA-256 over all of it: sites sign it with the survivors, so that the values of one lie where those of all others do."""
        row = [self.layout.fingerprint, self.grid.sites, self.grid.reach, self.grid.bits, sorted(self.counters.items())]
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()

    def __post_init__(self) -> None:
        if self.grid.sites > SITES:
            raise PrivacyError(f"packing: a cohort of {self.grid.sites} sites; counters are exact for {SITES} at most")


def pack(update: Update, schema: Schema) -> Codes:
    """One site's ``update`` as int32 (schema.size,).

    Raises:
        PrivacyError: the update is of another layout or grid, or its counters are not those of the schema.
    """
    lengths = {name: len(values) for name, values in update.counters.items()}
    if update.layout != schema.layout or update.grid != schema.grid or lengths != dict(schema.counters):
        raise PrivacyError(f"packing: counters {lengths} of {update.layout.size} values, the schema has {dict(schema.counters)}")
    values = [value for name in sorted(schema.counters) for value in update.counters[name]]
    weight = np.array([round(update.weight / WEIGHT_STEP)], np.int32)
    return np.concatenate([update.codes, weight, _limbs(np.array(values, np.float64)).ravel()])


def unpack(total: Codes, schema: Schema, count: int) -> Update:
    """The sum over ``count`` sites, from the sum of their vectors in the ring.

    Raises:
        PrivacyError: the vector is of another size, or holds what ``count`` sites could not have sent.
    """
    if total.dtype != np.int32 or total.shape != (schema.size,):
        raise PrivacyError(f"packing: the sum is {total.dtype}{list(total.shape)}, the schema needs int32[{schema.size}]")
    codes, weight = total[: schema.layout.size], float(total[schema.layout.size]) * WEIGHT_STEP
    counters = _counters(total[schema.layout.size + 1 :].reshape(-1, LIMBS), schema)
    values = [abs(value) for found in counters.values() for value in found]
    peak = int(np.abs(codes.astype(np.int64)).max(initial=0))
    if not 0.0 < weight <= count or max(values, default=0.0) > count * COUNTER_LIMIT or peak > count * schema.grid.limit:
        raise PrivacyError(f"packing: the sum over {count} sites has a weight ({weight:g}) or values that {count} sites cannot send")
    return Update(schema.layout, schema.grid, codes.copy(), weight, counters, count)


def _limbs(values: NDArray[np.float64]) -> Codes:
    """Counters (N,) as signed integers in base 2^16: (N, LIMBS), the highest limb carries the sign."""
    whole = np.rint(values / COUNTER_STEP).astype(np.int64)
    low = [(whole >> (LIMB * place)) & 0xFFFF for place in range(LIMBS - 1)]
    return np.stack([*low, whole >> (LIMB * (LIMBS - 1))], axis=1).astype(np.int32)


def _counters(limbs: Codes, schema: Schema) -> Counters:
    whole = [sum(int(limb) << (LIMB * place) for place, limb in enumerate(row)) for row in limbs]
    counters, start = {}, 0
    for name in sorted(schema.counters):
        stop = start + schema.counters[name]
        counters[name] = tuple(value * COUNTER_STEP for value in whole[start:stop])
        start = stop
    return counters
