"""A byte budget picks the codec: the one that keeps most and surely fits."""

from __future__ import annotations

from fedpeft.errors import ConfigError
from fedpeft.wire.codecs.base import Codec
from fedpeft.wire.codecs.floats import BF16
from fedpeft.wire.codecs.integers import Int2, Int4, Int8
from fedpeft.wire.codecs.ring import Plain, Ring
from fedpeft.wire.codecs.signs import OneBit
from fedpeft.wire.codecs.sparse import TopK

FREE: tuple[Codec, ...] = (Plain(), BF16(), Int8(), Int4(), Int2(), OneBit(), TopK(0.02), TopK(0.005), TopK(0.001))
"""From the most to the least that is kept, as measured at equal rounds with residuals kept."""
MASKED: tuple[Codec, ...] = (Plain(), Ring(16), Ring(12), Ring(8), Ring(6), Ring(4), Ring(3))


def choose(budget: int, size: int, masked: bool, sites: int = 1, beside: int = 0) -> Codec:
    """The codec that keeps most of ``size`` values of one of ``sites`` sites and surely takes no more than ``budget`` bytes.

    ``beside`` are bytes of what has its own form. Entropy codes mostly take less than the bound that is promised here.

    Raises:
        ConfigError: none fits.
    """
    ladder = MASKED if masked else FREE
    fitting = next((codec for codec in ladder if codec.most(size, sites) + beside <= budget), None)
    if fitting is not None:
        return fitting
    least = ladder[-1]
    advice = "a smaller rank or fewer target modules" + (", or secure aggregation off" if masked else "")
    raise ConfigError(
        f"wire.budget: {budget} bytes for {size} values of one of {sites} sites; {least.kind}, the smallest {'masked ' * masked}codec, "
        f"takes up to {least.most(size, sites) + beside}; allow that many, or choose {advice}"
    )
