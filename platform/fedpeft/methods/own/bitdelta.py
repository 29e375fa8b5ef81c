"""One-bit deltas for the way down (BitDelta, Liu et al. 2024, arXiv 2402.10193): signs and one scale per tensor; no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True, eq=False)
class SignDelta:
    """A delta of ``layout`` as ``signs`` (uint8, eight values a byte, 1 for positive) and ``scales`` (float32, one a tensor)."""

    layout: Layout
    signs: NDArray[np.uint8]
    scales: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.signs.shape != (-(-self.layout.size // 8),) or self.scales.shape != (len(self.layout.entries),):
            raise AdapterError(
                f"one-bit delta: {self.signs.size} bytes of signs and {self.scales.size} scales, the layout needs "
                f"{-(-self.layout.size // 8)} and {len(self.layout.entries)}; was it packed for another adapter?"
            )

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: a 32nd of float32, and four a tensor."""
        return self.signs.nbytes + self.scales.nbytes


def pack(delta: Tensors) -> SignDelta:
    """The nearest one-bit form of ``delta``, each tensor's scale being its mean absolute value.

    That scale minimises ``||d - s sign(d)||^2``, which is then ``||d||^2 - ||d||_1^2 / n`` per tensor: nothing for one magnitude,
    0.60 of the norm for a normal one. Send ``delta + (what was lost before)`` each time, and what is lost of all deltas together
    becomes an ever smaller share of them (0.60 after the first equal one, 0.20 after 16, 0.10 after 64).

    Raises:
        AdapterError: a value is not finite.
    """
    if not delta.finite:
        raise AdapterError("one-bit delta: a value is not finite; look for a diverging round before it is sent")
    scales = [np.abs(part, dtype=np.float64).mean() if part.size else 0.0 for part in delta.named().values()]
    return SignDelta(delta.layout, np.packbits(delta.flat > 0), np.array(scales, np.float32))


def unpack(packed: SignDelta) -> Tensors:
    """``scale * sign`` for every value; a value that was 0 comes back as ``-scale``."""
    sizes = [entry.size for entry in packed.layout.entries]
    signs = np.unpackbits(packed.signs, count=packed.layout.size).astype(np.float32) * np.float32(2.0) - np.float32(1.0)
    return Tensors(packed.layout, signs * np.repeat(packed.scales, sizes))
