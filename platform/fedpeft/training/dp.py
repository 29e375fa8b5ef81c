"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): a step that no single example can steer further than its clipped gradient.

Each step draws examples by secret Poisson sampling, clips every example's gradient over all trained tensors to norm C, adds Gaussian
noise of deviation sigma C to the sum, and divides by the expected batch size, which does not depend on who was drawn. What follows
(optimizer, FedProx's term, SCAFFOLD's correction) sees nothing else of the data. One backward gives all of it: `dp_recorder`.

What is protected is one example: one `Encoded` entry, added or removed. Of a conversation every answer is an example of its own.
The number of examples counts as known. The sum is rounded to a grid of 2^-26 of the noise's deviation before exact noise on that grid is
added, so that no bit of a floating-point sampler shows (Mironov 2012); the clipping norm is smaller by what that rounding can add.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import DataError, PrivacyError
from fedpeft.privacy.accounting import Event
from fedpeft.privacy.noise import FINE, SecureNoise
from fedpeft.training import dp_check
from fedpeft.training.dp_recorder import Recorder
from fedpeft.training.dp_sampling import Source, batches_of
from fedpeft.training.dp_sums import Bound, add_clipped
from fedpeft.training.engine import Arrays, LocalRun, Sums
from fedpeft.training.gradients import gradient_of
from fedpeft.training.scaling import START
from fedpeft.training.settings import TrainJob, TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Batch, Encoded, Task

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
FLOAT = 1e-5
"""What float32 may be wrong about a norm and a sum, generously."""


@dataclass(frozen=True)
class DpEngine:
    """DP-SGD with noise of ``noise_multiplier`` times ``clip``, the norm that no example's mean gradient per term exceeds.

    ``batch_size`` times ``accumulate`` of the training settings is the expected batch, ``batch_size`` about what runs at once;
    the settings' own ``clip`` is off, since it would clip noise. Sampling and noise come from `SecureNoise`, so a job that was
    killed goes on exactly (the same state and count of steps), but not to the same bits.
    """

    kind: ClassVar[str] = "dp"

    noise_multiplier: Positive
    clip: Positive = 1.0

    def begin(self, live: Live, task: Task, settings: TrainSettings, job: TrainJob) -> DpRun:
        """See `Engine.begin`. Raises `PrivacyError` for a noise or a clipping norm that protects nothing."""
        for name in ("noise_multiplier", "clip"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise PrivacyError(f"example-level privacy: {name} is {value}; it must be finite and above 0")
        return DpRun(self, live, task, settings, job, SecureNoise())


class DpRun:
    """One private job under way."""

    def __init__(self, engine: DpEngine, live: Live, task: Task, settings: TrainSettings, job: TrainJob, source: Source) -> None:
        self.engine, self.live, self.task, self.settings = engine, live, task, replace(settings, clip=0.0)
        self.local = LocalRun(live, task, self.settings, job)
        self.trained = {entry.name: live.parameters[entry.name] for entry in live.spec.layout.entries if entry.role in job.roles}
        self.recorder = Recorder(self.trained, getattr(live.spec.method, "kind", "this one"))
        self.expected, self.rate = settings.batch_size * settings.accumulate, 1.0
        self.source, self._job, self._moved = source, job, False
        self._grid = engine.noise_multiplier * engine.clip / FINE
        size = sum(param.numel() for param in self.trained.values())
        norm = engine.clip * (1.0 - FLOAT) - self._grid * sqrt(size)
        if norm <= 0.0:
            raise PrivacyError(
                f"example-level privacy: noise_multiplier {engine.noise_multiplier} is too much for {size} trained values; train fewer"
            )
        self._bound = Bound(norm, START if self.local.scaler else 1.0)

    def windows(self, data: Encoded) -> Iterator[Sequence[Batch]]:
        """See `Private.windows`. Raises `DataError` without examples, `PrivacyError` where the check of `dp_check` fails."""
        if not len(data):
            raise DataError(f"task {self.task.name}: no example to train on; give the source rows of the train split")
        self.rate = min(1.0, self.expected / len(data))
        dp_check.check(self.recorder, self.live, self.task, data)
        return self._drawn(data)

    def spent(self, steps: int) -> Event:
        """See `Private.spent`: steps of a job that was killed and resumed count once, since the lost ones left no trace."""
        return Event(self.engine.noise_multiplier, self.rate, steps)

    def step(self, number: int, window: Sequence[Batch]) -> Sums:
        """See `Run.step`; an empty window is a step by noise alone. Raises `PrivacyError` when a trained tensor does not move."""
        torch.manual_seed(int(self.source.words(1)[0]) >> 1)  # dropout by a seed that others know would tell examples apart
        self.local.gradients.clear()
        sums = [add_clipped(self.recorder, self.live, self.task, self.settings, batch, self._bound) for batch in window]
        self._disturb()
        self.local.gradients.condition(self.expected)
        before = None if self._moved else self.live.flat.detach().clone()
        self.local.move(number)
        if before is not None:
            self._moved = dp_check.moved(self.live, self.trained, before, self._job.mask is None)
        return Sums(sum(one.loss for one in sums), sum(one.count for one in sums))

    def state(self) -> Arrays:
        """See `Run.state`."""
        return self.local.state()

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `Run.restore`."""
        self.local.restore(arrays)

    def gradient(self, steps: int) -> NDArray[np.float32] | None:
        """The mean noisy gradient of the ``steps`` steps done; None unless the job wants it."""
        return self.local.gradient(steps)

    def _drawn(self, data: Encoded) -> Iterator[Sequence[Batch]]:
        while True:
            places = np.flatnonzero(self.source.chosen(len(data), self.rate))
            yield list(batches_of(self.task, data, places, self.settings.batch_size))

    def _disturb(self) -> None:
        """Add the noise to the sums of the clipped gradients, both as integers."""
        for param in self.local.params.values():
            gradient = gradient_of(param)
            noise = torch.from_numpy(self.source.rounded(gradient.numel(), FINE)).to(gradient.device)
            gradient.copy_(gradient.double().div_(self._grid).round_().add_(noise).mul_(self._grid))
