"""What a codec must answer: how many bytes at most, and either a delta's bytes or narrower integers of the round's grid."""

from __future__ import annotations

import hashlib
from typing import ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

Flat = NDArray[np.float32]
Codes = NDArray[np.int32]


class Codec(Protocol):
    """One way to write a site's delta in fewer bytes: a frozen dataclass with its settings, listed in ``CODECS``.

    ``masked`` says whether the sum of what sites send is the sum of their deltas, as masks need: then it is a `RingCodec`,
    else a `DeltaCodec`.
    """

    kind: ClassVar[str]
    masked: ClassVar[bool]

    def most(self, size: int, sites: int) -> int:
        """The most bytes that ``size`` values of one of ``sites`` sites can take."""
        ...


class DeltaCodec(Codec, Protocol):
    """Scales of the site's own: the coordinator decodes every message by itself.

    Laws (tested): what `decode` gives is float32 (size,) and finite; with a seed, integer codecs, bf16 and nf4 round to either
    neighbour so that the mean over seeds is the value; without one they round to the nearest.
    """

    def encode(self, flat: Flat, seed: int | None) -> bytes:
        """``flat`` float32 (size,), finite, as bytes; the same bytes for the same seed. ``None`` rounds to nearest."""
        ...

    def decode(self, data: bytes | memoryview, size: int) -> Flat:
        """The values of a message, float32 (size,). Raises `UpdateError` when it is not one of ``size`` values."""
        ...


class RingCodec(Codec, Protocol):
    """Integers whose scales the plan fixes for all sites, so that their sum, masked or not, is exact in ``width`` bits."""

    def width(self, sites: int) -> int:
        """Bits of the ring that holds the sum over ``sites`` sites."""
        ...


def as_delta(codec: Codec) -> DeltaCodec | None:
    """``codec`` where the coordinator decodes message by message; None where integers of the round's grid travel."""
    return None if codec.masked else cast(DeltaCodec, codec)


def seed_of(*parts: str | int) -> int:
    """A seed for rounding from the names of run, round, attempt, task and site: repeated answers are the same bytes.

    It is public: it hides nothing and serves no noise that privacy rests on.
    """
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(b"fedpeft rounding\0" + text).digest()[:16], "little")
