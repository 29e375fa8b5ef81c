"""A masked vector as it travels: an update, weight and counters included, in as few bits as hold the sum of the cohort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.packing import Codes, Schema, pack, unpack
from fedpeft.update import Update
from fedpeft.wire.codecs import Lanes


@dataclass(frozen=True)
class Vector:
    """What lies where (``schema``), and in how many bits (``lanes``; None: 32 each).

    Law (tested): `open` of the sum of what sites `pack`, masked or not and read from what they `write`, is the sum of their updates.
    """

    schema: Schema
    lanes: Lanes | None = None

    def pack(self, update: Update) -> Codes:
        """One site's update, int32 (schema.size,), to be masked in the ring of 2^32. Raises `PrivacyError` when it does not fit."""
        vector = pack(update, self.schema)
        return vector if self.lanes is None else self.lanes.shrink(vector)

    def write(self, masked: Codes) -> NDArray[Any]:
        """What travels: int32 codes, or bytes of their low bits, which is all that the sum needs."""
        return masked if self.lanes is None else self.lanes.write(masked)

    def read(self, values: NDArray[Any]) -> Codes:
        """Inverse of `write` as far as the bits go. Raises `UpdateError` when ``values`` are of another type or size."""
        if self.lanes is not None:
            return self.lanes.read(values, self.schema.size - self.schema.layout.size)
        if values.dtype != np.int32 or values.shape != (self.schema.size,):
            raise UpdateError(f"{values.size} masked values, the plan needs {self.schema.size}; do both sides run one version?")
        return values

    def open(self, total: Codes, count: int) -> Update:
        """The sum over ``count`` sites. Raises `PrivacyError` when it holds what they could not have sent."""
        if self.lanes is None:
            return unpack(total, self.schema, count)
        try:
            return unpack(self.lanes.grow(total, count), self.schema, count)
        except UpdateError as fault:
            raise PrivacyError(f"packing: {fault}") from None
