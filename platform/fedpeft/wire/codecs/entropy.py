"""Bytes of skewed frequency in fewer bytes: Huffman codes as zlib makes them, matches left out (they never pay on noise).

Symbols below a byte's range are packed several to a byte first (`fedpeft.wire.codecs.digits`), so that a symbol may cost less
than a bit. zlib codes 32,768 bytes with one table; what it cannot shrink is sent as it is.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError

STORED, HUFFMAN = b"\0", b"\1"
RAW = -15
"""zlib's window without header and checksum; the envelope carries a SHA-256."""


def squeeze(symbols: NDArray[np.uint8]) -> bytes:
    """``symbols`` in at most ``symbols.size + 1`` bytes."""
    plain = np.ascontiguousarray(symbols).tobytes()
    packer = zlib.compressobj(1, zlib.DEFLATED, RAW, 9, zlib.Z_HUFFMAN_ONLY)
    packed = packer.compress(plain) + packer.flush()
    return HUFFMAN + packed if len(packed) < len(plain) else STORED + plain


def expand(data: bytes | memoryview, size: int) -> NDArray[np.uint8]:
    """The ``size`` symbols of `squeeze`; never holds more than ``size`` + 1 bytes, whatever the message promises.

    Raises:
        UpdateError: another number of symbols, or no such message.
    """
    view = memoryview(data)
    mode, body = bytes(view[:1]), view[1:]
    plain = _inflate(body, size) if mode == HUFFMAN else bytes(body)
    if mode not in (STORED, HUFFMAN) or len(plain) != size:
        raise UpdateError(f"codec: {len(plain)} symbols in mode {mode!r}, {size} were expected; do both sides run one version?")
    return np.frombuffer(plain, np.uint8)


def _inflate(body: bytes | memoryview, size: int) -> bytes:
    unpacker = zlib.decompressobj(RAW)
    try:
        plain = unpacker.decompress(body, size + 1)
    except zlib.error as fault:
        raise UpdateError(f"codec: the coded symbols are malformed: {fault}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise UpdateError(f"codec: the coded symbols do not end after {size} as they should; do both sides run one version?")
    return plain
