"""Noised results on disk, by the release they are: noise is drawn once for a sum, whatever dies when.

A result is here before it is charged, and charged before anything else reads it. What is not here was seen by nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic
from fedpeft.privacy.ledger import Charge
from fedpeft.privacy.mechanism import Released
from fedpeft.tensors import Layout, Tensors

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Releases:
    """A folder of results with what each costs."""

    root: Path

    def put(self, name: str, charge: Charge, released: Released) -> None:
        """Keep the release ``name``, which ``charge`` is for: whole or not at all. Raises `StorageError`."""
        from safetensors.numpy import save

        said = {"charge": charge.to_json(), "counters": {k: list(v) for k, v in released.counters.items()}, "inside": released.inside}
        head = np.frombuffer(json.dumps(said, sort_keys=True).encode(), np.uint8)
        write_atomic(self._path(name), save({"mean": released.mean.flat, "said": head}), 0o600)

    def get(self, name: str, layout: Layout) -> tuple[Charge, Released] | None:
        """The release ``name`` of ``layout`` and its charge; None when it was never drawn. Raises `StorageError` when torn."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self._path(name)
        try:
            arrays = load(path.read_bytes())
            said = json.loads(arrays["said"].tobytes())
            counters = {key: tuple(values) for key, values in said["counters"].items()}
            return Charge.from_json(said["charge"]), Released(Tensors(layout, arrays["mean"]), counters, said["inside"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as fault:
            raise StorageError(f"{path}: cannot be read: {fault}; noise is not drawn twice: restore it from a backup") from None

    def prune(self, keep: Collection[str]) -> None:
        """Delete the results of releases that are not in ``keep``."""
        kept = {self._path(name) for name in keep}
        for path in self.root.glob(f"*{SUFFIX}"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.root / f"{hashlib.sha256(name.encode()).hexdigest()}{SUFFIX}"
