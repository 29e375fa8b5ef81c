"""Masks: AES-128-CTR keystreams added to or taken from 32-bit codes, block by block while the block is in the cache.

A key's stream is AES in counter mode from the counter block 0...02 on, which is also what AES-GCM with a zero nonce XORs to its text
(NIST SP 800-38D, section 7.1). OpenSSL has the wider instructions of newer processors for GCM alone, so the faster of the two is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from time import perf_counter

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Codes = NDArray[np.int32]

BLOCK = 1 << 16
KEY_SIZE = 16
_ZEROS = bytes(4 * BLOCK)


def apply_masks(codes: Codes, added: Sequence[bytes], taken: Sequence[bytes] = ()) -> None:
    """Add the keystreams of ``added`` and take those of ``taken``, in place, in the ring of 2^32.

    Each key is `KEY_SIZE` bytes and must never serve two vectors: the counter always starts at the same place.
    """
    ring, stream = codes.view(np.uint32), _fastest()
    streams = [(stream(key), np.add) for key in added] + [(stream(key), np.subtract) for key in taken]
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


def _ctr(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(15) + b"\2")).encryptor()


def _gcm(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()


@lru_cache(maxsize=1)
def _fastest() -> Callable[[bytes], CipherContext]:
    """Which of the two makes the stream sooner here; found once a process, in a millisecond. Their bytes are the same."""
    return min((_ctr, _gcm), key=lambda stream: min(_seconds(stream) for _ in range(5)))


def _seconds(stream: Callable[[bytes], CipherContext]) -> float:
    encryptor, buffer = stream(bytes(KEY_SIZE)), bytearray(len(_ZEROS))
    began = perf_counter()
    encryptor.update_into(_ZEROS, buffer)
    return perf_counter() - began
