"""A client's cache of versions: by content, verified whenever they are read, the least lately used leave when it is full."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpeft.control.staging import Staging
from fedpeft.errors import StorageError
from fedpeft.registry import Manifest
from fedpeft.registry.objects import Objects
from fedpeft.registry.store import Content, FolderStore
from fedpeft.signing import Keys

MOST = 8 << 30


def home() -> Path:
    """Where this user's cache lies: ``$FEDPEFT_CACHE``, or ``fedpeft`` in the user's cache folder."""
    own = os.environ.get("FEDPEFT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedpeft"


@dataclass(frozen=True)
class Cache:
    """Versions below ``root``, at most ``most`` bytes together; several processes may share it."""

    root: Path
    most: int = MOST

    @cached_property
    def objects(self) -> Objects:
        """The versions, and whose signatures count."""
        return Objects(FolderStore(self.root / "objects", durable=False), Keys(self.root / "keys", "manifest v1"))

    @property
    def staging(self) -> Staging:
        """Where streams land."""
        return Staging(self.root / "staging")

    def files(self, digest: str) -> dict[str, bytes] | None:
        """All files of a version with manifest and signature; None when it is not here. One that was damaged is dropped."""
        if not self.objects.store.sizes(digest):
            return None
        try:
            found = self.objects.files(digest)
        except StorageError:
            self.objects.store.drop(digest)
            return None
        with suppress(OSError):
            os.utime(self.root / "objects" / digest)
        return found

    def keep(self, manifest: Manifest, files: Mapping[str, Content], signature: bytes) -> None:
        """Add a version whose files were checked, and trust its signer; files given as paths are taken over. Raises `StorageError`."""
        self.objects.keys.trust(Keys.signer(signature))
        self.objects.put(manifest, files, signature)

    def evict(self, keep: str = "") -> tuple[str, ...]:
        """Drop the least lately used until the rest fit; returns who left. ``keep`` stays, unless it alone is too large."""
        self.staging.sweep()
        store, times = self.objects.store, {}
        for digest in store.names():
            with suppress(OSError):
                times[digest] = (digest == keep, (self.root / "objects" / digest).stat().st_mtime)
        sizes = {digest: sum(store.sizes(digest).values()) for digest in times}
        gone, total = [], sum(sizes.values())
        for digest in sorted(times, key=lambda name: times[name]):
            if total <= self.most:
                break
            store.drop(digest)
            total -= sizes[digest]
            gone.append(digest)
        return tuple(gone)
