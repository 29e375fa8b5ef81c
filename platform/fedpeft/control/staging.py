"""Where a stream of files lands until it is whole: a folder that outlives a broken stream and a killed process."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.control import files
from fedpeft.errors import LinkError, StorageError
from fedpeft.registry.store import Landed
from fedpeft.v1.registry_pb2 import Chunk

STALE = 86_400.0
"""Seconds after which a stream that nobody went on with is forgotten."""


@dataclass(frozen=True)
class Landing:
    """One version on its way: ``sizes`` are its files in order; a file is begun when the one before is complete."""

    folder: Path
    sizes: files.Sizes
    _hashed: dict[str, tuple[Any, int]] = field(default_factory=dict, repr=False)
    """SHA-256 so far by file, and of how many bytes: what arrives in order is hashed as it arrives."""

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    @property
    def offset(self) -> int:
        """Bytes that are here, from the beginning and without a gap."""
        have = 0
        for name, size in self.sizes.items():
            path = self.folder / name
            here = path.stat().st_size if path.exists() else 0
            if here > size:
                return have
            have += here
            if here < size:
                break
        return have

    def write(self, part: Chunk, offset: int) -> int:
        """Take the chunk at ``offset``; returns the next offset. Raises `StorageError` when it is damaged or out of place."""
        files.check(part, offset, self.total)
        begin = 0
        for name, size in self.sizes.items():
            if offset < begin + size:
                self._put(name, offset - begin, part.data, size)
                return offset + len(part.data)
            begin += size
        raise StorageError(f"{self.folder}: is complete, nothing can follow")

    def _put(self, name: str, start: int, data: bytes, size: int) -> None:
        if start + len(data) > size:
            raise StorageError(f"stream: a chunk crosses the end of {name} ({start} + {len(data)} of {size} bytes); send files apart")
        try:
            with open(self.folder / name, "r+b" if start else "wb", buffering=0) as stream:
                stream.seek(start)
                view = memoryview(data)
                while view:
                    view = view[stream.write(view) :]
            self._hash(name, start, data)
        except OSError as fault:
            raise StorageError(f"{self.folder / name}: cannot be written: {fault.strerror or fault}; free space, then go on") from None

    def _hash(self, name: str, start: int, data: bytes) -> None:
        state, length = (hashlib.sha256(), 0) if start == 0 else self._hashed.get(name, (None, -1))
        if length == start:
            state.update(data)
            self._hashed[name] = state, length + len(data)

    def _sha256(self, name: str) -> str:
        state, length = self._hashed.get(name, (None, -1))
        if length == self.sizes[name]:
            return str(state.hexdigest())
        with (self.folder / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def complete(self, wanted: Mapping[str, str]) -> dict[str, Landed]:
        """The files, when all are here and have the SHA-256 that ``wanted`` says.

        Raises:
            LinkError: the stream ended too early; it can go on.
            StorageError: a file was changed; all is forgotten, since nobody knows where.
        """
        if self.offset != self.total:
            raise LinkError(f"stream: ended after {self.offset} of {self.total} bytes; go on from there")
        for name, size in self.sizes.items():
            if not size:
                (self.folder / name).touch()
        wrong = [name for name in self.sizes if self._sha256(name) != wanted.get(name)]
        if wrong:
            self.forget()
            raise StorageError(f"stream: {wrong} do not have the SHA-256 that the manifest says; they were changed, send the version again")
        return {name: Landed(self.folder / name, wanted[name]) for name in self.sizes}

    def forget(self) -> None:
        """Remove what is here."""
        for path in list(self.folder.iterdir()):
            if path.name != ".lock":
                path.unlink()


@dataclass(frozen=True)
class Staging:
    """Landings below ``root``, at most ``most`` bytes together (0: no limit)."""

    root: Path
    most: int = 0

    @contextmanager
    def landing(self, name: str, sizes: files.Sizes) -> Iterator[Landing]:
        """The landing ``name``, for one stream at a time; removed when a stream left nothing in it.

        Raises:
            LinkError: another stream lands there now, or the landings are full.
            StorageError: it cannot be written.
        """
        folder = self.root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as fault:
            raise StorageError(f"{folder}: cannot be written: {fault.strerror or fault}; free space or check permissions") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            landing = Landing(folder, sizes)
            self._room(landing)
            yield landing
        except BlockingIOError:
            raise LinkError(f"{name[:12]}: another stream of it is under way; try again when it ended") from None
        finally:
            if not any(path.name != ".lock" for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def here(self, name: str, sizes: files.Sizes) -> int:
        """Bytes of an earlier stream."""
        return Landing(self.root / name, sizes).offset

    def sweep(self, now: float | None = None) -> None:
        """Forget landings that nobody went on with for `STALE` seconds."""
        for folder in self.root.glob("*"):
            youngest = max((path.stat().st_mtime for path in folder.glob("*")), default=folder.stat().st_mtime)
            if (now or time.time()) - youngest > STALE:
                shutil.rmtree(folder, ignore_errors=True)

    def _room(self, landing: Landing) -> None:
        held = sum(path.stat().st_size for path in self.root.glob("*/*") if path.parent != landing.folder)
        if self.most and held + landing.total > self.most:
            raise LinkError(f"staging: {held} bytes of other streams are here and {landing.total} more would exceed {self.most}; try later")
