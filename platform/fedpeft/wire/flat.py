"""One array as bytes: a fixed header (magic, type, length, layout fingerprint, checksum) and the little-endian values.

Packing and parsing cost one pass over the bytes and no Python per tensor; parsing returns a view of the input. The checksum finds
damage, not malice; that is TLS's.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.checksum import SIZE, checksum
from fedpeft.errors import UpdateError

MAGIC = b"FPv2"
HEAD = struct.Struct("<4s4sQ32s")
HEADER = HEAD.size + SIZE
"""Bytes before the values."""
TYPES: dict[bytes, np.dtype[Any]] = {tag.encode().ljust(4, b"\0"): np.dtype(tag) for tag in ("<i4", "<f4", "|u1")}
MAX_VALUES = 1 << 33


def pack(fingerprint: str, array: NDArray[Any]) -> bytes:
    """Serialise a 1-D int32, float32 or uint8 (a codec's message) ``array`` whose layout has the hex SHA-256 ``fingerprint``."""
    tag = array.dtype.newbyteorder("<").str.encode().ljust(4, b"\0")
    if tag not in TYPES or array.ndim != 1:
        raise UpdateError(f"wire: {array.dtype}{list(array.shape)} cannot travel; only 1-D int32, float32 and uint8 do")
    values = np.ascontiguousarray(array, TYPES[tag]).data
    head = HEAD.pack(MAGIC, tag, array.size, bytes.fromhex(fingerprint))
    return b"".join((head, checksum(head, values), values))


def unpack(data: bytes | memoryview, verify: bool = True) -> tuple[str, NDArray[Any]]:
    """Parse `pack`'s bytes into (layout fingerprint, read-only view of the values).

    Raises:
        UpdateError: truncated, tampered, or not of this format.
    """
    view = memoryview(data)
    if len(view) < HEADER or bytes(view[:4]) != MAGIC:
        raise UpdateError(f"wire: {len(view)} bytes are not a fedpeft array; do both sides run one version?")
    head, mark, body = view[: HEAD.size], view[HEAD.size : HEADER], view[HEADER:]
    _, tag, size, layout = HEAD.unpack(head)
    kind = TYPES.get(tag)
    if kind is None or size > MAX_VALUES or len(body) != size * kind.itemsize:
        raise UpdateError(f"wire: header promises {size} values, {len(body)} bytes follow; the message was cut or altered")
    if verify and checksum(head, body) != mark:
        raise UpdateError("wire: checksum mismatch; the message was altered on the way")
    return layout.hex(), np.frombuffer(body, kind)
