"""Stored versions: ``<digest>/`` holds an adapter's PEFT folder, its manifest and the signature, and never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import StorageError
from fedpeft.registry.manifest import NAME, SIGNATURE, Manifest, sha256
from fedpeft.registry.store import Content, FolderStore, Store
from fedpeft.signing import Keys


@dataclass(frozen=True)
class Objects:
    """The ``store`` of versions, named by the SHA-256 of their manifests; ``keys`` tells whose signatures count."""

    store: Store
    keys: Keys

    def path(self, digest: str) -> Path | None:
        """The folder of version ``digest``; None where the store is not made of folders."""
        return self.store.path(digest) if isinstance(self.store, FolderStore) else None

    def manifest(self, digest: str) -> Manifest:
        """The manifest of version ``digest``. Raises `StorageError` when it is missing or is not what the digest names."""
        data = self.store.get(digest, NAME)
        if sha256(data) != digest:
            raise StorageError(
                f"{self.store.where(digest)}/{NAME}: was changed, its SHA-256 is {sha256(data)[:12]}; pull or publish the version again"
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
        return {name: self.store.get(digest, name) for name in sorted(self.store.sizes(digest))}

    def put(self, manifest: Manifest, files: Mapping[str, Content], signature: bytes | None = None) -> str:
        """Store a version unless it is there intact; sign it with the own key when no ``signature`` comes with it.

        Raises:
            StorageError: it could not be written; nothing of it is visible.
        """
        digest, data = manifest.digest, manifest.to_bytes()
        whole = {**files, NAME: data, SIGNATURE: signature or self.keys.sign(data)}
        if not self.store.put(digest, whole) and self.faults(digest):
            self.store.drop(digest)
            self.store.put(digest, whole)
        return digest

    def faults(self, digest: str) -> list[str]:
        """Everything that is wrong with the stored version, one line each: missing, changed, added files, manifest, signature."""
        where, there = self.store.where(digest), self.store.sizes(digest)
        if not there:
            return [f"{where}: the version's folder is missing"]
        signature = self._signature_faults(digest, there)
        try:
            manifest = self.manifest(digest)
        except StorageError as fault:
            return [str(fault), *signature]
        faults = signature
        for name, wanted in sorted(manifest.files.items()):
            faults += self._file_faults(digest, name, wanted) if name in there else [f"{where}/{name}: missing"]
        extra = sorted(set(there) - {*manifest.files, NAME, SIGNATURE})
        return faults + [f"{where}/{name}: does not belong to the version" for name in extra]

    def _file_faults(self, digest: str, name: str, wanted: str) -> list[str]:
        seen = sha256(self.store.get(digest, name))
        where = f"{self.store.where(digest)}/{name}"
        return [] if seen == wanted else [f"{where}: was changed, its SHA-256 is {seen[:12]}, the manifest says {wanted[:12]}"]

    def _signature_faults(self, digest: str, there: Mapping[str, int]) -> list[str]:
        where = f"{self.store.where(digest)}/{SIGNATURE}"
        if NAME not in there:
            return []
        if SIGNATURE not in there:
            return [f"{where}: missing"]
        fault = self.keys.fault(self.store.get(digest, NAME), self.store.get(digest, SIGNATURE))
        return [f"{where}: {fault}"] if fault else []
