"""Error feedback: what a codec loses of a delta is kept at the site and added to the next (Seide et al. 2014; arXiv 1901.09847).

Pure functions: the caller keeps the residual, beside the site's other tensors, and takes up the new one with the answer it
belongs to. Under differential privacy the residual must be inside what is clipped: clip ``delta + residual``, never before.
"""

from __future__ import annotations

from fedpeft.tensors import Tensors
from fedpeft.wire.codecs.base import DeltaCodec


def send(codec: DeltaCodec, delta: Tensors, residual: Tensors | None, seed: int | None) -> tuple[bytes, Tensors]:
    """``delta`` and what was kept back, as a message, and what that message leaves out.

    Law: the sum of all decoded messages plus the last residual is the sum of all deltas, up to float32 rounding.

    Raises:
        UpdateError: a value is not finite.
    """
    whole = delta if residual is None else delta + residual
    message = codec.encode(whole.flat, seed)
    return message, whole - receive(codec, message, delta)


def receive(codec: DeltaCodec, message: bytes | memoryview, like: Tensors) -> Tensors:
    """The delta of a message, of the layout of ``like``. Raises `UpdateError` when it is malformed."""
    return Tensors(like.layout, codec.decode(message, like.layout.size))
