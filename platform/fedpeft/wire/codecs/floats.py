"""bf16: the upper half of float32, eight bits of magnitude kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.wire.codecs import rounding

Flat = NDArray[np.float32]

LARGEST = np.float32(3.3895314e38)


@dataclass(frozen=True)
class BF16:
    """Two bytes a value: at most 2^-8 of the value off, half of that when rounded to nearest."""

    kind: ClassVar[str] = "bf16"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return 2 * size

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        bits = np.clip(rounding.rows_of(flat, max(flat.size, 1)), -LARGEST, LARGEST).view(np.uint32).reshape(-1)
        bits += (bits >> 16 & 1) + np.uint32(0x7FFF) if seed is None else rounding.words(flat.size, seed)
        return (bits >> 16).astype("<u2").tobytes()

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        if len(data) != 2 * size:
            raise UpdateError(f"codec: {len(data)} bytes of bf16, {size} values take {2 * size}; do both sides run one version?")
        flat: Flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(flat).all():
            raise UpdateError("codec: a bf16 value is not finite; the site's training diverged")
        return flat
