"""State on disk: content-addressed safetensors files, written whole or not at all, checked when read.

The journal holds digests only; what they name lies here: global adapters, means of rounds, server optimizer states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic
from fedpeft.schemes import State
from fedpeft.tensors import Layout, Tensors

Arrays = Mapping[str, NDArray[Any]]
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Store:
    """A folder of blobs named by digest."""

    root: Path

    def put_tensors(self, tensors: Tensors) -> str:
        """Keep ``tensors``; returns `Tensors.digest`. Raises `StorageError`."""
        digest = tensors.digest
        self._write(digest, {"flat": tensors.flat})
        return digest

    def tensors(self, digest: str, layout: Layout) -> Tensors:
        """The tensors of ``digest``. Raises `StorageError` when absent, torn or of another layout."""
        flat = self._read(digest).get("flat")
        if flat is None or flat.shape != (layout.size,) or (found := Tensors(layout, flat)).digest != digest:
            raise StorageError(f"{self._path(digest)}: is torn or of another layout; restore the state folder from a backup")
        return found

    def put_arrays(self, arrays: Arrays) -> str:
        """Keep named arrays; returns the SHA-256 over names, types, shapes and values. Raises `StorageError`."""
        digest = digest_of(arrays)
        self._write(digest, arrays)
        return digest

    def arrays(self, digest: str) -> dict[str, NDArray[Any]]:
        """The named arrays of ``digest``. Raises `StorageError` when absent or torn."""
        arrays = self._read(digest)
        if digest_of(arrays) != digest:
            raise StorageError(f"{self._path(digest)}: is torn; restore the state folder from a backup")
        return arrays

    def state(self, digest: str) -> State:
        """A server optimizer's state; empty when ``digest`` is. Raises `StorageError` when absent or torn."""
        return self.arrays(digest) if digest else {}

    def put_state(self, state: State) -> str:
        """Keep ``state``; its digest, empty when it is. Raises `StorageError`."""
        return self.put_arrays(state) if state else ""

    def prune(self, keep: Collection[str]) -> int:
        """Delete blobs that are not in ``keep``; returns how many."""
        old = [path for path in self.root.glob(f"*{SUFFIX}") if path.stem not in keep]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _path(self, digest: str) -> Path:
        return self.root / f"{digest}{SUFFIX}"

    def _write(self, digest: str, arrays: Arrays) -> None:
        from safetensors.numpy import save

        if not self._path(digest).exists():
            write_atomic(self._path(digest), save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))

    def _read(self, digest: str) -> dict[str, NDArray[Any]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self._path(digest)
        try:
            return dict(load(path.read_bytes()))
        except FileNotFoundError:
            raise StorageError(f"{path}: is missing; restore the state folder from a backup, or start anew with another one") from None
        except (OSError, SafetensorError) as fault:
            raise StorageError(f"{path}: cannot be read: {fault}; restore the state folder from a backup") from None


def digest_of(arrays: Arrays) -> str:
    """SHA-256 over sorted names, types, shapes and values."""
    hasher = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        hasher.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        hasher.update(np.ascontiguousarray(value).data)
    return hasher.hexdigest()
