"""Stored versions: ``<digest>/`` holds an adapter's PEFT folder, its manifest and the signature, and never changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        return self._manifest(digest, {NAME: self.store.get(digest, NAME)})

    def check(self, digest: str) -> None:
        """Raise `StorageError` with the first fault when version ``digest`` is not intact."""
        _raise(self.faults(digest))

    def files(self, digest: str) -> dict[str, bytes]:
        """All files of version ``digest``, by name, each read once. Raises `StorageError` when it is not intact."""
        held = {name: self.store.get(digest, name) for name in sorted(self.store.sizes(digest))}
        _raise(self._faults(digest, held))
        return held

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
        return self._faults(digest, _Lazily(self.store, digest))

    def _faults(self, digest: str, held: Mapping[str, bytes]) -> list[str]:
        where = self.store.where(digest)
        if not held:
            return [f"{where}: the version's folder is missing"]
        signature = self._signature_faults(where, held)
        try:
            manifest = self._manifest(digest, held)
        except StorageError as fault:
            return [str(fault), *signature]
        faults = signature
        for name, wanted in sorted(manifest.files.items()):
            faults += _file_faults(f"{where}/{name}", held[name], wanted) if name in held else [f"{where}/{name}: missing"]
        extra = sorted(set(held) - {*manifest.files, NAME, SIGNATURE})
        return faults + [f"{where}/{name}: does not belong to the version" for name in extra]

    def _manifest(self, digest: str, held: Mapping[str, bytes]) -> Manifest:
        if NAME not in held:
            raise StorageError(f"{self.store.where(digest)}/{NAME}: cannot be read: missing; pull or publish the version again")
        data = held[NAME]
        if sha256(data) != digest:
            raise StorageError(
                f"{self.store.where(digest)}/{NAME}: was changed, its SHA-256 is {sha256(data)[:12]}; pull or publish the version again"
            )
        return Manifest.from_bytes(data)

    def _signature_faults(self, where: str, held: Mapping[str, bytes]) -> list[str]:
        if NAME not in held:
            return []
        if SIGNATURE not in held:
            return [f"{where}/{SIGNATURE}: missing"]
        fault = self.keys.fault(held[NAME], held[SIGNATURE])
        return [f"{where}/{SIGNATURE}: {fault}"] if fault else []


class _Lazily(Mapping[str, bytes]):
    """A version's files by name, read when they are looked at, so that one at a time is in memory."""

    def __init__(self, store: Store, digest: str) -> None:
        self._store, self._digest, self._names = store, digest, store.sizes(digest)

    def __getitem__(self, name: str) -> bytes:
        return self._store.get(self._digest, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _file_faults(where: str, data: bytes, wanted: str) -> list[str]:
    seen = sha256(data)
    return [] if seen == wanted else [f"{where}: was changed, its SHA-256 is {seen[:12]}, the manifest says {wanted[:12]}"]


def _raise(faults: list[str]) -> None:
    if faults:
        raise StorageError(f"{faults[0]}; pull or publish the version again ({len(faults)} fault(s), see `fedpeft adapters verify`)")
