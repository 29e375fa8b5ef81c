"""What is audited: one way of training one task's adapter on one base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSpec, attach, initial
from fedpeft.errors import DataError
from fedpeft.tensors import Tensors
from fedpeft.training import TrainJob, TrainResult, TrainSettings, train
from fedpeft.training.modes import evaluating

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.bases import Base
    from fedpeft.tasks import Batch, Row, Task
    from fedpeft.training.engine import Engine


@dataclass(frozen=True)
class Subject:
    """A task's adapter ``spec`` on ``base``, trained with ``settings``; ``engine`` None is the plain local one.

    ``roles`` None trains all of the adapter. ``seed`` draws the start, and order and dropout of every training.
    """

    base: Base
    task: Task
    spec: AdapterSpec
    settings: TrainSettings
    engine: Engine | None = None
    roles: frozenset[str] | None = None
    seed: int = 0

    @property
    def start(self) -> Tensors:
        """The round-0 adapter."""
        return initial(self.base, self.spec, self.seed).tensors

    @contextmanager
    def trained(self, start: Tensors, rows: Sequence[Row]) -> Iterator[tuple[Live, TrainResult]]:
        """The adapter after training from ``start`` on ``rows``, and what was done. Raises `DataError` without rows, `UpdateError`."""
        if not rows:
            raise DataError(f"audit of task {self.task.name}: no row to train on; give more rows")
        data = self.task.encode(rows, self.base)
        job = TrainJob(self.roles or self.spec.layout.roles, self.seed)
        with attach(self.base, self.spec) as live:
            live.load(start)
            yield live, train(live, self.task, data, self.settings, job, self.engine)

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """Every row as a batch of its own."""
        return [next(iter(self.task.batches(self.task.encode([row], self.base), 1, 0, 0))) for row in rows]

    def losses(self, live: Live, batches: Sequence[Batch]) -> NDArray[np.float64]:
        """The loss of each batch, in nats."""
        with evaluating(live.model), torch.no_grad():
            return np.array([float(self.task.loss(live.model, batch).total) for batch in batches])
