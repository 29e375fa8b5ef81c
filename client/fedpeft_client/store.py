"""The site's files: one blob per key, written whole or not at all, checked when read, the oldest dropped first.

They hold updates in the clear, so their owner alone may read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic

SEAL = hashlib.sha256().digest_size
KEY = re.compile(r"[0-9a-f]{64}")
LITTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Store:
    """A bounded folder of blobs; keys are hex digests. A blob that is torn on disk counts as absent."""

    root: Path
    keep: int

    def put(self, key: str, blob: bytes) -> None:
        """Write ``blob`` under ``key``: temporary file, fsync, rename, fsync of the folder. Raises `StorageError`."""
        write_atomic(self._path(key), hashlib.sha256(blob).digest() + blob, 0o600)
        self._trim()

    def get(self, key: str) -> bytes | None:
        """The blob of ``key``, or None; reading it makes it the youngest."""
        path = self._path(key)
        try:
            sealed = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as fault:
            raise StorageError(f"{path}: cannot be read: {fault.strerror}; check the permissions of the state folder") from None
        if hashlib.sha256(sealed[SEAL:]).digest() != sealed[:SEAL]:
            path.unlink(missing_ok=True)
            return None
        return sealed[SEAL:]

    def __contains__(self, key: str) -> bool:
        return KEY.fullmatch(key) is not None and self._path(key).is_file()

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise StorageError(f"store {self.root.name}: key {key[:80]!r} is not a SHA-256 in hex; do both sides run one version?")
        return self.root / key

    def _trim(self) -> None:
        blobs = sorted((p for p in self.root.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime_ns)
        for old in blobs[: -self.keep]:
            old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Held:
    """Which global adapter the site last held of each task, by digest, in the file at ``path``; a torn file counts as empty."""

    path: Path

    def get(self, task: str) -> str:
        """The digest; empty when there is none."""
        return self._all.get(task, "")

    def put(self, task: str, digest: str) -> None:
        """Remember ``digest``. Raises `StorageError`."""
        if self._all.get(task) != digest:
            self._all[task] = digest
            write_atomic(self.path, json.dumps(self._all, sort_keys=True).encode())

    @cached_property
    def _all(self) -> dict[str, str]:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(task): str(digest) for task, digest in held.items()} if isinstance(held, dict) else {}


def sweep(root: Path) -> None:
    """Remove what writers that were killed left behind under ``root``: temporary files of more than an hour ago."""
    before = time.time() - LITTER_SECONDS
    for path in root.rglob(".new-*"):
        with suppress(OSError):
            if path.stat().st_mtime < before:
                path.unlink()


def scratch(root: Path, key: str, keep: int) -> Path:
    """A folder for half-done work under ``key``; of the others the ``keep`` youngest stay. Raises `StorageError`."""
    folder = root / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        os.utime(folder)
        others = sorted((p for p in root.iterdir() if p != folder), key=lambda p: p.stat().st_mtime_ns)
    except OSError as fault:
        raise StorageError(f"{folder}: cannot be made: {fault.strerror}; free space or set `state` in site.toml to another disk") from None
    for old in others[: max(len(others) - keep, 0)]:
        shutil.rmtree(old, ignore_errors=True)
    return folder
