"""A private run of one small causal task, with noise that repeats, and the clipped sum computed slowly."""

from __future__ import annotations

import numpy as np
import torch

from fedpeft.adapters import initial
from fedpeft.tasks import Encoded, Generation
from fedpeft.training import TrainJob, TrainSettings
from fedpeft.training.dp import DpEngine, DpRun
from fedpeft.training.dp_sums import singles, terms_of

TASK = Generation("t", metrics=("perplexity",))
SGD = TrainSettings(steps=1, batch_size=8, lr=0.5, optimizer="sgd")


class Seeded:
    """Noise that repeats, for tests alone; ``scale`` 0 is none at all."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        self.rng, self.scale = np.random.default_rng(seed), scale

    def words(self, size: int) -> np.ndarray:
        return self.rng.integers(0, 2**64, size, np.uint64)

    def rounded(self, size: int, sigma: float) -> np.ndarray:
        return np.rint(self.rng.standard_normal(size) * sigma * self.scale).astype(np.int64)

    def chosen(self, size: int, rate: float) -> np.ndarray:
        return self.rng.random(size) < rate


def rows(count: int, seed: int = 0) -> Encoded:
    """Random causal examples of many lengths, some of one loss term."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 24, count)
    ids = tuple(rng.integers(3, 500, length).astype(np.int32) for length in lengths)
    return Encoded(ids, np.arange(count), np.maximum(1, lengths // 2), np.arange(count), 0)


def place(live):
    """At values none of which is zero, the same each time."""
    live.load(initial(live.base, live.spec, 0).tensors)
    live.flat.add_(torch.randn(live.flat.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)


def private(live, settings=SGD, engine=None, source=None, **job):
    roles = job.pop("roles", live.spec.layout.roles)
    live.train_roles(roles)
    return DpRun(engine or DpEngine(1.0, 0.1), live, TASK, settings, TrainJob(roles, 0, **job), source or Seeded())


def clipped_sum(live, batch, clip):
    """One plain backward for each example, float64."""
    total, norms = np.zeros(live.spec.layout.size), []
    for one, terms in zip(singles(batch), terms_of(batch).tolist(), strict=True):
        live.grad.zero_()
        TASK.loss(live.model, one).total.backward()
        gradient = live.grad.double().numpy() / terms
        norms.append(np.linalg.norm(gradient))
        total += gradient * min(1.0, clip / norms[-1])
    live.grad.zero_()
    return total, np.array(norms)
