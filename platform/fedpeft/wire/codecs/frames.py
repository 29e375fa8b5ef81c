"""Messages of several parts, each with its length before it."""

from __future__ import annotations

import struct

from fedpeft.errors import UpdateError

LENGTH = struct.Struct("<I")


def join(*parts: bytes) -> bytes:
    """``parts`` as one message."""
    return b"".join(piece for part in parts for piece in (LENGTH.pack(len(part)), part))


def split(data: bytes | memoryview, count: int) -> list[memoryview]:
    """The ``count`` parts of a message. Raises `UpdateError` when it holds fewer, more, or is cut."""
    view = memoryview(data).cast("B")
    parts: list[memoryview] = []
    for _ in range(count):
        if len(view) < LENGTH.size or len(view) - LENGTH.size < (size := LENGTH.unpack_from(view)[0]):
            raise UpdateError(f"codec: part {len(parts) + 1} of {count} is cut short; do both sides run one version?")
        parts.append(view[LENGTH.size : LENGTH.size + size])
        view = view[LENGTH.size + size :]
    if len(view):
        raise UpdateError(f"codec: {len(view)} bytes follow the last of {count} parts; do both sides run one version?")
    return parts
