"""The site's rows, read once, tokenised once, embedded once, and kept for the life of the worker."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError
from fedpeft.tasks import read_rows
from fedpeft_client.config import SiteConfig

if TYPE_CHECKING:
    from fedpeft.bases import Base, Encoder
    from fedpeft.tasks import Encoded, Row, Task

Split = Literal["train", "test"]
EMBEDDED = 1024
"""Most rows of a task that are embedded."""


@dataclass(frozen=True)
class Shelf:
    """Everything of ``site.data`` that was asked for so far."""

    site: SiteConfig
    _rows: dict[tuple[str, Split], list[Row]] = field(default_factory=dict)
    _encoded: dict[tuple[str, Split], tuple[Any, Encoded]] = field(default_factory=dict)
    _vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _digests: dict[tuple[str, Split], str] = field(default_factory=dict)

    def rows(self, task: str, split: Split) -> list[Row]:
        """Rows of one split. Raises `DataError` when the task is not the site's, or its source cannot be read."""
        if task not in self.site.data:
            raise DataError(f"task {task!r}: site {self.site.name} holds no rows of it; tasks of [data] are {sorted(self.site.data)}")
        if (task, split) not in self._rows:
            self._rows[task, split] = read_rows(self.site.data[task], split)
        return self._rows[task, split]

    def count(self, task: str, split: Split) -> int:
        """Number of rows of one split; 0 when the source has no such split."""
        try:
            return len(self.rows(task, split))
        except DataError:
            if split == "train":
                raise
            return 0

    def digest(self, task: str, split: Split) -> str:
        """SHA-256 over the rows of one split."""
        if (task, split) not in self._digests:
            body = json.dumps(self.rows(task, split), sort_keys=True, default=str)
            self._digests[task, split] = hashlib.sha256(body.encode()).hexdigest()
        return self._digests[task, split]

    def encoded(self, task: Task, split: Split, base: Base) -> Encoded:
        """The rows of one split, tokenised for ``task``; again only when the plan's idea of the task changes."""
        known = self._encoded.get((task.name, split))
        if known is None or known[0] != task:
            known = (task, self._encode(task, split, base))
            self._encoded[task.name, split] = known
        return known[1]

    def _encode(self, task: Task, split: Split, base: Base) -> Encoded:
        try:
            return task.encode(self.rows(task.name, split), base)
        except DataError as fault:
            raise DataError(f"[data.{task.name}], {self.site.data[task.name].label}, split {split}: {fault}") from None

    def vectors(self, task: Task, encoder: Encoder) -> NDArray[np.float32]:
        """Embeddings (N, D) of train rows' texts by ``encoder``, each of length 1; at most `EMBEDDED` rows, evenly spread."""
        key = f"{task.name} {encoder.encoder}"
        if key not in self._vectors:
            self._vectors[key] = encoder.embed(self.texts(task))
        return self._vectors[key]

    def texts(self, task: Task) -> list[str]:
        """The train rows' texts that `vectors` embeds."""
        rows = self.rows(task.name, "train")
        return [task.text_of(row) for row in rows[:: -(-len(rows) // EMBEDDED)]]
