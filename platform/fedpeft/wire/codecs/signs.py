"""One bit a value: its sign, and a block's mean magnitude (EF-SignSGD, Karimireddy et al. 2019, arXiv 1901.09847)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.wire.codecs import frames, rounding, scales
from fedpeft.wire.codecs.integers import Block

Flat = NDArray[np.float32]


@dataclass(frozen=True)
class OneBit:
    """Signs alone: biased, so a residual must be kept; ``seed`` changes nothing."""

    block: Block = 64

    kind: ClassVar[str] = "onebit"
    masked: ClassVar[bool] = False

    def most(self, size: int, sites: int) -> int:
        """See `DeltaCodec`."""
        return 2 * frames.LENGTH.size + scales.most(-(-size // self.block)) + -(-size // 8)

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """See `DeltaCodec`."""
        magnitudes = np.abs(rounding.rows_of(flat, self.block))
        counts = np.full(len(magnitudes), self.block, np.float64)
        counts[-1:] -= magnitudes.size - flat.size
        head, _ = scales.pack((magnitudes.sum(axis=1, dtype=np.float64) / counts).astype(np.float32))
        return frames.join(head, np.packbits(flat > 0).tobytes())

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """See `DeltaCodec`."""
        head, body = frames.split(data, 2)
        if len(body) != -(-size // 8):
            raise UpdateError(f"codec: {len(body)} bytes of signs, {size} values take {-(-size // 8)}; do both sides run one version?")
        magnitudes = np.repeat(scales.unpack(head, -(-size // self.block)), self.block)[:size]
        signs = np.unpackbits(np.frombuffer(body, np.uint8), count=size)
        return np.where(signs, magnitudes, -magnitudes)
