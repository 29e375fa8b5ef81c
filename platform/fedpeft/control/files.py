"""A version's files as one stream: their bytes one after another in chunks, each with its place and its CRC-32."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

from fedpeft.control.bounds import CHUNK
from fedpeft.errors import AdapterError, LinkError, StorageError
from fedpeft.registry.manifest import FILE
from fedpeft.v1.registry_pb2 import Chunk, File

Sizes = Mapping[str, int]
"""Bytes by file name, in the order in which the files travel."""


def to_proto(sizes: Sizes) -> list[File]:
    """As messages."""
    return [File(name=name, size=size) for name, size in sizes.items()]


def from_proto(files: Sequence[File], most: int) -> dict[str, int]:
    """Inverse of `to_proto`. Raises `AdapterError` when a name is no plain file name, comes twice, or all exceed ``most`` bytes."""
    sizes = {file.name: int(file.size) for file in files}
    bad = [file.name for file in files if not FILE.fullmatch(file.name)]
    if bad or len(sizes) != len(files):
        raise AdapterError(f"version: file names {[file.name for file in files]} are not distinct plain names; publish it anew")
    if sum(sizes.values()) > most:
        raise AdapterError(f"version: has {sum(sizes.values())} bytes, this registry takes {most} (control.max_version)")
    return sizes


def spans(sizes: Sizes, offset: int, step: int = CHUNK) -> Iterator[tuple[str, int, int, int]]:
    """File, start, end and place in the stream of each chunk from ``offset`` on; a chunk never crosses the end of a file."""
    begin = 0
    for name, size in sizes.items():
        start = min(max(offset - begin, 0), size)
        while start < size:
            end = min(start + step, size)
            yield name, start, end, begin + start
            start = end
        begin += size


def fill(part: Chunk, data: bytes, offset: int) -> None:
    """Make ``part`` the chunk with ``data`` at ``offset`` of the stream; filled in place, the data is copied once."""
    part.offset, part.crc, part.data = offset, zlib.crc32(data), data


def check(part: Chunk, offset: int, total: int) -> None:
    """Refuse a chunk that does not continue a stream of ``total`` bytes at ``offset`` (`LinkError`) or was changed (`StorageError`)."""
    if part.offset != offset or not part.data or offset + len(part.data) > total:
        raise LinkError(
            f"stream: got {len(part.data)} bytes for place {part.offset}, expected place {offset} of {total}; go on from {offset}"
        )
    seen = zlib.crc32(part.data)
    if seen != part.crc:
        raise StorageError(
            f"stream: the chunk at {offset} was changed on its way (CRC-32 {seen:08x}, not {part.crc:08x}); go on from {offset}"
        )
