"""Where versions' files lie: folders that never change, in a local folder or behind any fsspec URL."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fedpeft.adapters.folder import write_folder
from fedpeft.errors import StorageError
from fedpeft.registry import disk

Content = bytes | Path
"""A file's bytes, or a local file that holds them (which a store may take over)."""


@dataclass(frozen=True)
class Landed:
    """A local file, and the SHA-256 of what was written into it as it came."""

    path: Path
    sha256: str


class Store(Protocol):
    """Named folders of files; a folder appears whole or not at all and is never changed."""

    def where(self, name: str) -> str:
        """The folder ``name`` for people."""
        ...

    def put(self, name: str, files: Mapping[str, Content]) -> bool:
        """Make folder ``name`` if it is absent; whether it was. Raises `StorageError`, and then nothing of it is visible."""
        ...

    def get(self, name: str, file: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``start`` to ``end`` of a file. Raises `StorageError` when it is missing or unreadable."""
        ...

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes by file name; empty where there is no such folder. Raises `StorageError`."""
        ...

    def names(self) -> tuple[str, ...]:
        """All folders. Raises `StorageError`."""
        ...

    def drop(self, name: str) -> None:
        """Remove folder ``name``, where it is there. Raises `StorageError`."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """Folders below ``root``, each by one rename; one writer at a time, and what dead writers left is swept.

    Unless it is ``durable``, a power cut may tear the youngest folders: for caches, which check what they read.
    """

    root: Path
    durable: bool = True

    def path(self, name: str) -> Path:
        """Where folder ``name`` lies."""
        return self.root / name

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.path(name))

    def put(self, name: str, files: Mapping[str, Content]) -> bool:
        """Write, fsync, rename; files given as paths are moved when they are on the same disk."""
        with disk.writing(self.root.parent):
            self._sweep()
            if self.path(name).exists():
                return False
            write_folder(self.path(name), files, self.durable)
            return True

    def get(self, name: str, file: str, start: int = 0, end: int | None = None) -> bytes:
        """One positioned read."""
        path = self.path(name) / file
        if start == 0 and end is None:
            return disk.read(path)
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(start)
                return stream.read(-1 if end is None else end - start) or b""
        except OSError as fault:
            raise StorageError(f"{path}: cannot be read: {fault.strerror or fault}; run `fedpeft adapters verify`") from None

    def sizes(self, name: str) -> dict[str, int]:
        """From the folder's entries."""
        folder = self.path(name)
        return {path.name: path.stat().st_size for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    def names(self) -> tuple[str, ...]:
        """Folders whose name is not hidden: those are half made."""
        return tuple(sorted(path.name for path in self.root.glob("[!.]*") if path.is_dir()))

    def drop(self, name: str) -> None:
        """Rename away first, so that no reader sees a part of it."""
        with disk.writing(self.root.parent):
            if self.path(name).exists():
                self.path(name).rename(self.root / f".{name}.damaged.partial")
            self._sweep()

    def _sweep(self) -> None:
        """Remove what writers that died left; the caller holds the writer lock, so nobody is writing."""
        for leftover in self.root.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)


LAST = "manifest.json"
"""Written last behind a URL, where no folder can be renamed: a folder without it is not there."""
BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss"})
"""Object stores: their folders are parts of names, and who asks for one may be given a new bucket."""


@dataclass(frozen=True)
class UrlStore:
    """Folders below any fsspec ``url`` (s3://, gs://, abfs://, memory://, file://); `LAST` makes one visible."""

    url: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError, OSError) as fault:
            raise StorageError(
                f"{self._shown}: cannot be opened: {fault}; give a folder or an fsspec URL such as s3://bucket/place"
            ) from None
        return filesystem, root.rstrip("/")

    def where(self, name: str) -> str:
        """Its URL, a password in it left out."""
        return f"{self._shown}/{name}"

    @property
    def _shown(self) -> str:
        return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", self.url.rstrip("/"))

    def put(self, name: str, files: Mapping[str, Content]) -> bool:
        """Equal names have equal content, so two writers at once do no harm."""
        if self.sizes(name):
            return False
        order = sorted(files, key=lambda file: (file == LAST, file))
        with self._named(name) as (filesystem, folder), self._within_bucket():
            if not BUCKETS & set(_protocols(filesystem)):
                filesystem.makedirs(folder, exist_ok=True)
            for file in order:
                content = files[file]
                filesystem.pipe_file(f"{folder}/{file}", content.read_bytes() if isinstance(content, Path) else content)
        return True

    def get(self, name: str, file: str, start: int = 0, end: int | None = None) -> bytes:
        """One range request; object stores refuse one that begins at the end, which is what a finished transfer asks for."""
        with self._named(f"{name}/{file}") as (filesystem, path):
            try:
                return bytes(filesystem.cat_file(path, start=start, end=end))
            except OSError:
                if not start or start < filesystem.info(path)["size"]:
                    raise
                return b""

    def sizes(self, name: str) -> dict[str, int]:
        """One listing."""
        with self._named(name) as (filesystem, folder):
            found = {row["name"].rsplit("/", 1)[-1]: int(row["size"]) for row in self._listing(filesystem, folder) if row["type"] == "file"}
        return found if LAST in found else {}

    def names(self) -> tuple[str, ...]:
        """One listing of all files, as object stores count it."""
        with self._named("") as (filesystem, folder), self._within_bucket():
            filesystem.invalidate_cache(folder)
            found = (path.rsplit("/", 2)[-2:] for path in filesystem.find(folder))
            return tuple(sorted(name for name, file in found if file == LAST))

    def drop(self, name: str) -> None:
        """`LAST` goes first, so that no reader sees a part of it."""
        files = self.sizes(name)
        with self._named(name) as (filesystem, folder):
            for file in sorted(files, key=lambda file: (file != LAST, file)):
                filesystem.rm_file(f"{folder}/{file}")

    @staticmethod
    def _listing(filesystem: Any, folder: str) -> list[dict[str, Any]]:
        filesystem.invalidate_cache(folder)
        try:
            return list(filesystem.ls(folder, detail=True))
        except FileNotFoundError:
            return []

    @contextmanager
    def _named(self, name: str) -> Iterator[tuple[Any, str]]:
        filesystem, root = self._place
        try:
            yield filesystem, f"{root}/{name}"
        except StorageError:
            raise
        except Exception as fault:  # noqa: BLE001 - each store's library has exceptions of its own, many of no common kind
            first = str(fault).partition("\n")[0][:200]
            raise StorageError(f"{self.where(name)}: {type(fault).__name__}: {first}; check the URL, the rights and the network") from None

    @contextmanager
    def _within_bucket(self) -> Iterator[None]:
        """Listing and writing find nothing missing but a bucket."""
        try:
            yield
        except FileNotFoundError:
            bucket = self._place[1].partition("/")[0]
            raise StorageError(
                f"{self._shown}: there is no bucket or container {bucket!r}; create it, or correct the URL: a registry makes none"
            ) from None


def _protocols(filesystem: Any) -> tuple[str, ...]:
    """What stands before :// in its URLs."""
    found = filesystem.protocol
    return (found,) if isinstance(found, str) else tuple(found)


def open_store(place: str | Path) -> FolderStore | UrlStore:
    """A folder's versions lie in ``place/objects``, a URL's below it. Raises `StorageError` when the URL's kind is unknown."""
    text = str(place)
    if "://" not in text:
        return FolderStore(Path(text) / "objects")
    store = UrlStore(f"{text.rstrip('/')}/objects")
    store.names()
    return store
