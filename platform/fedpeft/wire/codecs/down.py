"""The way down: a step of the global adapter in a codec, with error feedback at the coordinator.

With signs and one scale a block this is BitDelta (Liu et al. 2024, arXiv 2402.10193). What the message says becomes the adapter at the
coordinator too, so that all hold the same bits; what it leaves out is added to the next step.
"""

from __future__ import annotations

from fedpeft.tensors import Tensors
from fedpeft.wire.codecs.base import DeltaCodec
from fedpeft.wire.codecs.feedback import receive, send


def tell(codec: DeltaCodec, before: Tensors, after: Tensors, residual: Tensors) -> tuple[bytes, Tensors, Tensors]:
    """Coordinator: the message of a step, what everyone then holds, and the next residual; all of one layout.

    Raises:
        UpdateError: a value is not finite.
    """
    message, left = send(codec, after - before, residual, None)
    return message, hear(codec, before, message), left


def hear(codec: DeltaCodec, before: Tensors, message: bytes | memoryview) -> Tensors:
    """What ``before`` becomes by a message of `tell`. Raises `UpdateError` when it is malformed."""
    return before + receive(codec, message, before)
