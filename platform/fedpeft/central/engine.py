"""The DeepSpeed engine: one optimizer step of a joint job on all ranks."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.central import scaling
from fedpeft.central.balancing import Balancing
from fedpeft.central.codes import SCALES
from fedpeft.central.joint import Joint, JointTask, Mixed
from fedpeft.central.moments import MOMENTS, gather_moments, get_values, set_moments
from fedpeft.central.together import add_up, gathered, require_equal
from fedpeft.central.world import World
from fedpeft.central.zero import sized
from fedpeft.errors import AdapterError, UpdateError
from fedpeft.training.engine import Arrays, Sums, autocast, optimizer_of, rate, schedule
from fedpeft.training.scaling import Scaler, scaled
from fedpeft.training.settings import TrainJob, TrainSettings

WAYS = "ways"
"""The checkpoint's array of how each rank multiplied, from the first step on, so that a job goes on to the same bits in another process."""
MOVED = "moved"
"""What a checkpoint calls the steps that the optimizer took: all but those that were skipped."""


@dataclass(frozen=True)
class ZeroEngine:
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) over the ranks of ``world``; ``table`` is DeepSpeed's JSON.

    A step equals `LocalEngine`'s on the whole batch but for the order of sums: losses are divided by the number of their task's
    terms on all ranks and micro-batches, and each task weighs what ``balancing`` says: the same, unless the job's file says otherwise.
    """

    table: Mapping[str, Any]
    world: World
    balancing: Balancing
    kind: ClassVar[str] = "deepspeed"

    def __repr__(self) -> str:
        """A job is the same on any number of ranks and in any stage."""
        return f"ZeroEngine({'' if self.balancing.plain else self.balancing.plan})"

    def begin(self, live: Joint, task: JointTask, settings: TrainSettings, job: TrainJob) -> ZeroRun:
        """See `Engine.begin`."""
        return ZeroRun(self, live, task, settings)


class ZeroRun:
    """One job under way; the engine itself starts at the first step, when it is known what is restored."""

    def __init__(self, engine: ZeroEngine, live: Joint, task: JointTask, settings: TrainSettings) -> None:
        self.world, self.table, self.live, self.task, self.settings = engine.world, engine.table, live, task, settings
        self.balancing = engine.balancing
        self.groups = _groups(live, settings)
        self.base_lr = [group["lr"] for group in self.groups]
        device = torch.device(live.bank.store.device)
        self.scaler = Scaler() if scaled(settings, live.bank.model, device) else None
        self.losses: dict[str, float] = {}
        self.tokens = 0
        self._moments: dict[str, NDArray[Any]] = {}
        self._steps = self._moved = 0
        self._zero: Any = None

    def step(self, number: int, window: Sequence[Mixed]) -> Sums:
        """See `Run.step`; afterwards ``losses`` are of the tasks that were in it, ``tokens`` how many it had on all ranks."""
        zero = self.started()
        self.tokens = sum(mixed.tokens for mixed in window)
        self.balancing.begin(zero, number, self.settings.batch_size)
        counts = sum((self.task.pool.counts(mixed.picks) for mixed in window), np.zeros(len(self.task.pool.names), np.int64))
        device = self.live.bank.store.device
        weights = self.balancing.weights(counts > 0).astype(np.float32)
        scale = torch.tensor(weights / np.maximum(counts, 1) * self.world.size * len(window), device=device)
        scale *= scaling.begin(zero, self.scaler)
        sums = torch.zeros(len(counts), device=device)
        for place, mixed in enumerate(window):
            with autocast(self.settings, torch.device(device)):
                found = zero(mixed.part(self.world.rank, self.world.size))
            zero.backward((found * scale.to(found.dtype)).sum())
            sums += found.detach()
            if place < len(window) - 1:
                zero.step()
        self._check(number, sums, counts)
        self.balancing.settle(zero, number)
        self._rate(number)
        skipped = self._skipped(number, scaling.finish(zero, self.scaler, self.world))
        self._steps, self._moved = self._steps + 1, self._moved + (not skipped)
        self.live.bank.choices.settled = True
        self._require_present()
        losses = np.array([self.losses.get(name, np.nan) for name in self.task.pool.names])
        self.balancing.learn(zero, number, losses, self.settings.batch_size)
        return Sums(float(sums.sum()), int(counts.sum()), skipped)

    def state(self) -> Arrays | None:
        """See `Run.state`: all ranks gather, rank 0 has it."""
        ways = {WAYS: _coded(gathered(self.world, self.live.bank.choices.kept))}
        if self._zero is None:
            arrays: Arrays = {f"{name}|value": self.live.bank.flat(name).cpu().numpy().copy() for name in self.live.specs}
            return arrays | self._moments | self.balancing.arrays() | ways | self._scale() if self.world.rank == 0 else None
        arrays = get_values(self.live.bank)
        arrays |= gather_moments(self._zero, self.live.bank, self.world.size)
        arrays |= self.balancing.arrays() | {"steps": np.array(self._steps)} | ways | self._scale()
        return arrays if self.world.rank == 0 else None

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `Run.restore`; comes before the first step."""
        for name in self.live.specs:
            self.live.bank.flat(name).copy_(torch.from_numpy(np.array(arrays[f"{name}|value"])))
        self.balancing.restore(arrays)
        if self.scaler:
            self.scaler.restore(arrays)
        self._moments = {key: value for key, value in arrays.items() if key == SCALES or key.rpartition("|")[2] in MOMENTS}
        self._steps = int(arrays["steps"]) if "steps" in arrays else 0
        self._moved = int(arrays.get(MOVED, self._steps))
        if WAYS in arrays:
            said = json.loads(arrays[WAYS].tobytes())
            self.live.bank.choices.recall(said[self.world.rank] if len(said) == self.world.size else dict(ChainMap(*said)))

    @property
    def ended(self) -> bool:
        """See `Ending.ended`: every task stopped early."""
        return not self.balancing.going(self._steps).any()

    @property
    def told(self) -> Mapping[str, float]:
        """What `Balancing.told` says of the last step, and the loss scale of the next."""
        return self.balancing.told | ({"loss scale": self.scaler.scale} if self.scaler else {})

    def gradient(self, steps: int) -> None:
        """A joint job keeps no mean gradient."""

    def started(self) -> Any:
        """DeepSpeed's engine, which starts at the first call; all ranks call at once."""
        if self._zero is None:
            import deepspeed

            require_equal(self.world, "checkpoint", f"{self._steps} steps")
            optimizer = optimizer_of(self.groups, self.settings)
            self._zero, *_ = deepspeed.initialize(
                model=self.live.model, optimizer=optimizer, config=sized(self.table, self.live.spec.layout.size)
            )
            if self._moments:
                set_moments(self._zero, self.live.bank, self._moments, self._moved, (self.world.rank, self.world.size))
                self._moments = {}
        return self._zero

    def _scale(self) -> Arrays:
        """What a scaled job adds to a checkpoint: the scale, and how many steps the optimizer did take."""
        return self.scaler.arrays() | {MOVED: np.array(self._moved)} if self.scaler else {}

    def _check(self, number: int, sums: torch.Tensor, counts: NDArray[np.int64]) -> None:
        """Sum ``sums`` over the ranks; raise on all of them when it is not finite, before the optimizer moves."""
        add_up(self.world, sums)
        means = sums.cpu().numpy() / np.maximum(counts, 1)
        self.losses = {name: float(mean) for name, mean, terms in zip(self.task.pool.names, means, counts, strict=True) if terms}
        wrong = {name: loss for name, loss in self.losses.items() if not isfinite(loss)}
        if wrong:
            raise UpdateError(
                f"training: step {number + 1} of {self.settings.steps} has losses {wrong}; lower training.lr (now {self.settings.lr:g}), "
                "set training.clip, or look for broken rows; the last checkpoint is good"
            )

    def _skipped(self, number: int, finite: bool) -> bool:
        """Whether step ``number`` was left out. Raises `UpdateError` where that is not to be made good by another scale."""
        if self.scaler is not None:
            self.scaler.learn(number, finite)
        elif not finite:
            raise UpdateError(
                f"training: step {number + 1} of {self.settings.steps} has gradients that are not finite; lower training.lr (now "
                f"{self.settings.lr:g}), set training.clip, or look for broken rows; the last checkpoint is good"
            )
        return not finite

    def _rate(self, number: int) -> None:
        """A task that has ended rests at rate 0, where neither momentum nor decay moves it."""
        factor, names = schedule(self.settings, number), self.task.pool.names
        ended = {name for name, going in zip(names, self.balancing.going(number), strict=True) if not going}
        for group, base, own in zip(self._zero.optimizer.param_groups, self.base_lr, self.groups, strict=True):
            group["lr"] = 0.0 if own["name"].partition("/")[0] in ended else base * factor

    def _require_present(self) -> None:
        """Nobody may have switched an adapter off: its gradient would be stale, or another's. Raises `AdapterError`."""
        off = [name for name in self.live.specs if not all(p.requires_grad for p in self.live.bank.parameters(name).values())]
        if off:
            raise AdapterError(
                f"adapters {off} were switched off during training; under ZeRO every adapter takes part in every step, use gates (Bank.use)"
            )


def _coded(value: Any) -> NDArray[np.uint8]:
    """A plain value as bytes of JSON."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _groups(live: Joint, settings: TrainSettings) -> list[dict[str, Any]]:
    """One group of parameters per adapter and role, each with its learning rate."""
    groups = []
    for name, spec in live.specs.items():
        own: Mapping[str, nn.Parameter] = live.bank.parameters(name)
        for role in sorted(spec.layout.roles):
            params = [own[entry.name] for entry in spec.layout.entries if entry.role == role]
            groups.append({"params": params, "lr": rate(settings, spec.method, role), "name": f"{name}/{role}"})
    return groups
