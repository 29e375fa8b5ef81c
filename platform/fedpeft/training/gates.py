"""PHATGOOSE's gates (Muqeeth et al. 2024, arXiv 2402.05859, section 3.1): trained after the adapter, which stands still.

Every LoRA layer gives ``y + sigmoid(v . x) (B A x)`` with a gate v (n,) that starts at zero; v is all that trains. What it learns is which
tokens the adapter helps with, so gates of adapters that never met can be compared (`fedpeft.routing.GateRouter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from fedpeft.training.settings import TrainJob, TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Encoded, Task

Gates = dict[str, NDArray[np.float32]]


def train_gates(live: Live, task: Task, data: Encoded, settings: TrainSettings, job: TrainJob) -> Gates:
    """Gates (n,) by module of the base, after ``settings.steps`` steps of AdamW at ``settings.lr``; the adapter stays as it is.

    Of ``job`` the seed and the progress count.

    Raises:
        AdapterError: the adapter has no LoRA layers.
        DataError: ``data`` holds no example.
        UpdateError: a loss is not finite.
    """
    sizes = lora_modules(live.spec.layout)
    if not sizes:
        raise AdapterError(f"gates: {live.spec.method.kind} of task {live.spec.task!r} has no LoRA layers, which gates open")
    live.train_roles(())
    gates = {module: nn.Parameter(torch.zeros(size, device=live.flat.device)) for module, size in sizes.items()}
    optimizer = torch.optim.AdamW(gates.values(), lr=settings.lr, weight_decay=0.0)
    with evaluating(live.model), own_randomness(live.flat.device), gated(live.model, gates):
        for number, window in enumerate(islice(windows(task, data, settings, job.seed), settings.steps), 1):
            loss = _step(live, task, window, optimizer)
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


def _step(live: Live, task: Task, window: Any, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    total, count = 0.0, 0
    for batch in window:
        loss = task.loss(live.model, batch)
        if loss.count:
            loss.total.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.total.detach()), count + loss.count
    for group in optimizer.param_groups:
        for gate in group["params"]:
            if gate.grad is not None:
                gate.grad /= max(count, 1)
    optimizer.step()
    return total / max(count, 1)
