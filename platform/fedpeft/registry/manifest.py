"""Manifest: where a version comes from; its canonical bytes are what is hashed and signed, and no clock or machine enters them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from fedpeft import __version__
from fedpeft.adapters import Adapter
from fedpeft.config import describe
from fedpeft.errors import StorageError

FORMAT = 1
NAME, SIGNATURE = "manifest.json", "manifest.sig"
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Files of a version lie in its folder: a name with a slash, or of dots, would point out of it."""
SHAPES: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: isinstance(value, str),
    "adapter": lambda value: isinstance(value, str),
    "method": lambda value: isinstance(value, dict),
    "metrics": lambda value: isinstance(value, dict) and all(isinstance(score, int | float) for score in value.values()),
    "card": lambda value: value is None or isinstance(value, dict),
    "files": lambda value: isinstance(value, dict) and all(map(FILE.fullmatch, value)) and all(isinstance(h, str) for h in value.values()),
    "max_tokens": lambda value: type(value) is int and value > 0,
}
"""What of a manifest others read before they trust it."""
SINCE = {"max_tokens"}
"""Fields that manifests of old lack: left out where they say nothing, so that those keep their digests."""


@dataclass(frozen=True)
class Manifest:
    """The publisher gives the lineage; ``task`` to ``ranks``, ``adapter``, ``files`` and ``fedpeft`` are filled from the adapter.

    Attributes:
        task_settings: the table that builds the task again (``kind`` and settings).
        quantization: how the sites held the base, each kind once.
        max_tokens: where texts were cut; 0, which is not written, in versions that do not say.
        parents: digests of the versions that this one was trained from.
        metrics: finite scores by name; others are left out.
        weight: sum of the sites' weights in the last round; ``examples`` and ``sites`` count likewise.
        card: the router card (`fedpeft.routing.Card.to_json`).
        adapter: digest over spec and tensors.
        files: SHA-256 by file name.
    """

    task_settings: Mapping[str, Any] = field(default_factory=dict)
    quantization: tuple[str, ...] = ()
    scheme: str = ""
    federation: str = ""
    round: int = 0
    parents: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0
    examples: int = 0
    sites: int = 0
    card: Mapping[str, Any] | None = None
    task: str = ""
    base_model: str = ""
    base: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    adapter: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    fedpeft: str = ""
    max_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back."""
        table = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in table.items()}
        return {name: value for name, value in told.items() if value or name not in SINCE}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`. Raises `StorageError` when fields are missing or unknown."""
        names = {item.name for item in dataclasses.fields(Manifest)}
        if odd := sorted((set(table) | SINCE) ^ names):
            raise StorageError(f"manifest: fields {odd} are missing or unknown; it was written by another version of fedpeft")
        wrong = [name for name, good in SHAPES.items() if name in table and not good(table[name])]
        if wrong:
            raise StorageError(f"manifest: {wrong} are not what they should be; it was not written by fedpeft, do not use it")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
        return Manifest(**values)

    def to_bytes(self) -> bytes:
        """The canonical form: one line of JSON with sorted keys."""
        table = {"format": FORMAT, **self.to_json()}
        return (json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Inverse of `to_bytes`. Raises `StorageError` when ``data`` is torn or of another format."""
        try:
            table = json.loads(data)
        except (ValueError, RecursionError) as fault:
            raise StorageError(f"{NAME}: torn or not JSON ({fault})") from None
        if not isinstance(table, dict) or table.pop("format", None) != FORMAT:
            raise StorageError(f"{NAME}: not of format {FORMAT}; it was written by another version of fedpeft")
        return Manifest.from_json(table)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: the version's name."""
        return sha256(self.to_bytes())


def complete(lineage: Manifest, adapter: Adapter, files: Mapping[str, bytes], digest: str = "") -> Manifest:
    """``lineage`` with all that the adapter, its ``files`` and its ``digest`` tell, which is computed where it is not known."""
    spec = adapter.spec
    return dataclasses.replace(
        lineage,
        metrics={name: float(value) for name, value in sorted(lineage.metrics.items()) if isfinite(value)},
        task=spec.task,
        base_model=spec.base_model,
        base=spec.base,
        method=describe(spec.method),
        ranks=tuple(sorted({entry.shape[0] for entry in spec.layout.entries if entry.role == "A"})),
        adapter=digest or adapter.digest,
        files={name: sha256(data) for name, data in sorted(files.items())},
        fedpeft=__version__,
    )


def sha256(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()
