"""How a site's delta is written in fewer bytes; numpy and zlib only (see README.md)."""

from fedpeft.wire.codecs.base import Codec, DeltaCodec, RingCodec, as_delta, seed_of
from fedpeft.wire.codecs.budget import choose
from fedpeft.wire.codecs.down import hear, tell
from fedpeft.wire.codecs.feedback import receive, send
from fedpeft.wire.codecs.floats import BF16
from fedpeft.wire.codecs.integers import Int2, Int3, Int4, Int8
from fedpeft.wire.codecs.lanes import Lanes
from fedpeft.wire.codecs.nf4 import NF4
from fedpeft.wire.codecs.ring import Plain, Ring, as_ring
from fedpeft.wire.codecs.signs import OneBit
from fedpeft.wire.codecs.sparse import TopK

CODECS: dict[str, type[Codec]] = {
    "none": Plain,
    "bf16": BF16,
    "int8": Int8,
    "int4": Int4,
    "int3": Int3,
    "int2": Int2,
    "nf4": NF4,
    "topk": TopK,
    "onebit": OneBit,
    "ring": Ring,
}

__all__ = [
    "BF16",
    "CODECS",
    "NF4",
    "Codec",
    "DeltaCodec",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Lanes",
    "OneBit",
    "Plain",
    "Ring",
    "RingCodec",
    "TopK",
    "as_delta",
    "as_ring",
    "choose",
    "hear",
    "receive",
    "seed_of",
    "send",
    "tell",
]
