"""PHATGOOSE's gates (Muqeeth et al. 2024, arXiv 2402.05859, section 3.1): trained after the adapter, which stands still.

Every LoRA layer gives ``y + sigmoid(v . x) (B A x)`` with a gate v (n,) that starts at zero; v is all that trains. What it learns is which
tokens the adapter helps with, so gates of adapters that never met can be compared (`fedpeft.routing.GateRouter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.errors import AdapterError, UpdateError
from fedpeft.routing.cardfile import lora_modules
from fedpeft.training.loop import own_randomness, windows
from fedpeft.training.modes import evaluating
from fedpeft.training.scaling import Scaler, scaled
from fedpeft.training.settings import TrainJob, TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Batch, Encoded, Task

Gates = dict[str, NDArray[np.float32]]


def train_gates(live: Live, task: Task, data: Encoded, settings: TrainSettings, job: TrainJob) -> Gates:
    """Gates (n,) by module of the base, after ``settings.steps`` steps of AdamW at ``settings.lr``; the adapter stays as it is.

    Of ``job`` the seed and the progress count.

    Raises:
        AdapterError: the adapter has no LoRA layers.
        DataError: ``data`` holds no example.
        UpdateError: a loss is not finite, or gradients are not at any scale.
    """
    sizes = lora_modules(live.spec.layout)
    if not sizes:
        raise AdapterError(f"gates: {live.spec.method.kind} of task {live.spec.task!r} has no LoRA layers, which gates open")
    live.train_roles(())
    gates = {module: nn.Parameter(torch.zeros(size, device=live.flat.device)) for module, size in sizes.items()}
    run = _Run(live, task, gates, settings)
    with evaluating(live.model), own_randomness(live.flat.device), gated(live.model, gates):
        for number, window in enumerate(islice(windows(task, data, settings, job.seed), settings.steps), 1):
            loss = run.step(number, window)
            if not np.isfinite(loss):
                raise UpdateError(f"gates: step {number} of {settings.steps} has loss {loss}; lower routing.lr (now {settings.lr:g})")
            if job.progress:
                job.progress(number, loss)
    return {module: gate.detach().cpu().numpy() for module, gate in gates.items()}


@contextmanager
def gated(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each adapted layer of ``model`` adds ``sigmoid(v . x)`` of what it would; x (..., n)."""
    handles = []
    for module, gate in gates.items():
        layer: Any = model.get_submodule(module)
        plain: list[Tensor] = []
        handles.append(layer.base_layer.register_forward_hook(partial(_keep, plain)))
        handles.append(layer.register_forward_hook(partial(_open, plain, gate)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(plain: list[Tensor], layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    plain[:] = [output]


def _open(plain: list[Tensor], gate: Tensor, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    base = plain.pop()
    share = (inputs[0].to(gate.dtype) @ gate).sigmoid().unsqueeze(-1)
    opened: Tensor = base + (share * (output - base)).to(output.dtype)
    return opened


class _Run:
    """Steps of AdamW on gates alone; a step whose gradients overflow fp16 is left out (`scaling`)."""

    def __init__(self, live: Live, task: Task, gates: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        self.live, self.task, self.gates = live, task, list(gates.values())
        self.optimizer = torch.optim.AdamW(self.gates, lr=settings.lr, weight_decay=0.0)
        self.scaler = Scaler() if scaled(settings, live.model, live.flat.device) else None

    def step(self, number: int, window: Sequence[Batch]) -> float:
        """Do step ``number`` (from 1) on the micro-batches of ``window``; the mean loss. Raises `UpdateError` as `Scaler.learn`."""
        self.optimizer.zero_grad()
        total, count, scale = 0.0, 0, 1.0
        for batch in window:
            loss = self.task.loss(self.live.model, batch)
            if loss.count:
                if self.scaler and not count:
                    scale = self.scaler.of_sum(loss.count * len(window))
                (loss.total * scale).backward()  # type: ignore[no-untyped-call]
                total, count = total + float(loss.total.detach()), count + loss.count
        if count and np.isfinite(total) and self._fits(number):
            for gate in self.gates:
                if gate.grad is not None:
                    gate.grad /= count * scale
            self.optimizer.step()
        return total / max(count, 1)

    def _fits(self, number: int) -> bool:
        """Whether no gradient overflowed by its scale; without one that is for the loss to say."""
        if self.scaler is None:
            return True
        finite = all(bool(gate.grad.isfinite().all()) for gate in self.gates if gate.grad is not None)
        self.scaler.learn(number - 1, finite)
        return finite
