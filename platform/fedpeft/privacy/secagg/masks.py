"""Masks: AES-CTR keystreams added to or taken from 32-bit codes, block by block while the block is in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Codes = NDArray[np.int32]

BLOCK = 1 << 16
KEY_SIZE = 16
_ZEROS = bytes(4 * BLOCK)


def apply_masks(codes: Codes, added: Sequence[bytes], taken: Sequence[bytes] = ()) -> None:
    """Add the keystreams of ``added`` and take those of ``taken``, in place, in the ring of 2^32.

    Each key is `KEY_SIZE` bytes and must never serve two vectors: the counter starts at zero.
    """
    ring = codes.view(np.uint32)
    streams = [(_stream(key), np.add) for key in added] + [(_stream(key), np.subtract) for key in taken]
    buffer = bytearray(4 * BLOCK)
    words = np.frombuffer(buffer, "<u4")
    for start in range(0, len(ring), BLOCK):
        block = ring[start : start + BLOCK]
        for encryptor, operate in streams:
            encryptor.update_into(_ZEROS[: 4 * len(block)], buffer)
            operate(block, words[: len(block)], out=block)


def keystream(key: bytes, size: int) -> Codes:
    """The first ``size`` codes of a key's stream."""
    codes = np.zeros(size, np.int32)
    apply_masks(codes, [key])
    return codes


def _stream(key: bytes):  # type: ignore[no-untyped-def]
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
