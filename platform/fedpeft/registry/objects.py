"""Stored versions: ``objects/<digest>/`` holds an adapter's PEFT folder, its manifest and the signature, and never changes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpeft.adapters.folder import write_folder
from fedpeft.errors import StorageError
from fedpeft.registry import disk
from fedpeft.registry.manifest import NAME, SIGNATURE, Manifest, sha256
from fedpeft.signing import Keys


@dataclass(frozen=True)
class Objects:
    """The ``folder`` of versions, named by the SHA-256 of their manifests; ``keys`` tells whose signatures count."""

    folder: Path
    keys: Keys

    def path(self, digest: str) -> Path:
        """Where version ``digest`` lies."""
        return self.folder / digest

    def manifest(self, digest: str) -> Manifest:
        """The manifest of version ``digest``. Raises `StorageError` when it is missing or is not what the digest names."""
        data = disk.read(self.path(digest) / NAME)
        if sha256(data) != digest:
            raise StorageError(
                f"{self.path(digest) / NAME}: was changed, its SHA-256 is {sha256(data)[:12]}; pull or publish the version again"
            )
        return Manifest.from_bytes(data)

    def check(self, digest: str) -> None:
        """Raise `StorageError` with the first fault when version ``digest`` is not intact."""
        faults = self.faults(digest)
        if faults:
            raise StorageError(f"{faults[0]}; pull or publish the version again ({len(faults)} fault(s), see `fedpeft adapters verify`)")

    def files(self, digest: str) -> dict[str, bytes]:
        """All files of version ``digest``, by name. Raises `StorageError` when it is not intact."""
        self.check(digest)
        return {path.name: disk.read(path) for path in sorted(self.path(digest).iterdir())}

    def put(self, manifest: Manifest, files: Mapping[str, bytes], signature: bytes | None = None) -> str:
        """Store a version unless it is there intact; sign it with the own key when no ``signature`` comes with it.

        Raises:
            StorageError, OSError: it could not be written; nothing of it is visible.
        """
        digest, data = manifest.digest, manifest.to_bytes()
        self._sweep()
        if self.path(digest).exists():
            if not self.faults(digest):
                return digest
            self.path(digest).rename(self.folder / f".{digest}.damaged.partial")
            self._sweep()
        write_folder(self.path(digest), {**files, NAME: data, SIGNATURE: signature or self.keys.sign(data)})
        return digest

    def faults(self, digest: str) -> list[str]:
        """Everything that is wrong with the stored version, one line each: missing, changed, added files, manifest, signature."""
        folder = self.path(digest)
        if not folder.is_dir():
            return [f"{folder}: the version's folder is missing"]
        try:
            manifest = self.manifest(digest)
        except StorageError as fault:
            return [str(fault), *self._signature_faults(folder)]
        faults = self._signature_faults(folder)
        for name, wanted in sorted(manifest.files.items()):
            faults += _file_faults(folder / name, wanted)
        extra = sorted({path.name for path in folder.iterdir()} - {*manifest.files, NAME, SIGNATURE})
        return faults + [f"{folder / name}: does not belong to the version" for name in extra]

    def _signature_faults(self, folder: Path) -> list[str]:
        if not (folder / NAME).is_file():
            return []
        if not (folder / SIGNATURE).is_file():
            return [f"{folder / SIGNATURE}: missing"]
        fault = self.keys.fault(disk.read(folder / NAME), disk.read(folder / SIGNATURE))
        return [f"{folder / SIGNATURE}: {fault}"] if fault else []

    def _sweep(self) -> None:
        """Remove what writers that died left; the caller holds the writer lock, so nobody is writing."""
        for leftover in self.folder.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)


def _file_faults(path: Path, wanted: str) -> list[str]:
    if not path.is_file():
        return [f"{path}: missing"]
    seen = sha256(disk.read(path))
    return [] if seen == wanted else [f"{path}: was changed, its SHA-256 is {seen[:12]}, the manifest says {wanted[:12]}"]
