"""How one optimizer step is done. The loop is the same for every engine; an engine owns gradients, optimizer and their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.privacy.accounting import Event
from fedpeft.training.gradients import Gradients
from fedpeft.training.scaling import Scaler, half_of, scaled
from fedpeft.training.settings import TrainJob, TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Batch, Encoded, Task

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Sums:
    """Loss summed over ``count`` terms (labelled tokens or examples) of one optimizer step, which may have been ``skipped`` (`scaling`)."""

    loss: float
    count: int
    skipped: bool = False


class Run(Protocol):
    """One job under way."""

    def step(self, number: int, window: Sequence[Batch]) -> Sums:
        """Do optimizer step ``number`` (from 0) on the micro-batches of ``window``. Raises `UpdateError` when it is not finite."""

    def state(self) -> Arrays | None:
        """Copies of all that `restore` needs to go on bit-identically: values and moments. None where another process saves them."""

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""

    def gradient(self, steps: int) -> NDArray[np.float32] | None:
        """The mean raw gradient of the ``steps`` steps done; None unless the job wants it."""


@runtime_checkable
class Private(Protocol):
    """A run that draws its examples in secret, and whose every released value is accounted for."""

    def windows(self, data: Encoded) -> Iterator[Sequence[Batch]]:
        """The micro-batches of each step from here on, endless; a window may be empty."""

    def spent(self, steps: int) -> Event:
        """What ``steps`` steps cost each example."""


@runtime_checkable
class Ending(Protocol):
    """A run that may have learnt all that it will before its last step."""

    @property
    def ended(self) -> bool:
        """Whether no further step is to be done."""


class Engine(Protocol):
    """Local, differentially private, or DeepSpeed."""

    kind: ClassVar[str]

    def begin(self, live: Live, task: Task, settings: TrainSettings, job: TrainJob) -> Run:
        """Prepare to train ``job.roles`` of ``live`` on ``task``; the values at this moment are FedProx's anchor."""


@dataclass(frozen=True)
class LocalEngine:
    """One process, one device: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) or SGD on slices of the flat buffer."""

    kind: ClassVar[str] = "local"

    def begin(self, live: Live, task: Task, settings: TrainSettings, job: TrainJob) -> LocalRun:
        """See `Engine.begin`."""
        return LocalRun(live, task, settings, job)


class LocalRun:
    """One parameter per trained role, each a slice of ``live.flat`` whose gradient is a slice of ``live.grad``."""

    def __init__(self, live: Live, task: Task, settings: TrainSettings, job: TrainJob) -> None:
        self.live, self.task, self.settings = live, task, settings
        self.params = _slices(live, job.roles)
        self.base_lr = {role: rate(settings, live.spec.method, role) for role in self.params}
        groups = [{"params": [param], "lr": self.base_lr[role], "role": role} for role, param in self.params.items()]
        self.optimizer = optimizer_of(groups, settings)
        self.gradients = Gradients(self.params, live.spec.layout, settings, job)
        self.scaler = Scaler() if scaled(settings, live.model, live.flat.device) else None

    def step(self, number: int, window: Sequence[Batch]) -> Sums:
        """See `Run.step`."""
        self.gradients.clear()
        total, count, scale = self._backward(window)
        if count == 0:
            return Sums(0.0, 0)
        if self._overflows(number, total):
            return Sums(float(total), count, skipped=True)
        norm = self.gradients.condition(count * scale)
        loss, size = torch.stack((total, norm)).tolist()
        if not (isfinite(loss) and isfinite(size)):
            raise UpdateError(
                f"training: step {number + 1} of {self.settings.steps} has loss {loss / count:.4g} and gradient norm {size:.4g}; "
                f"lower training.lr (now {self.settings.lr:g}), set training.clip, or look for broken rows"
            )
        self.move(number)
        return Sums(loss, count)

    def move(self, number: int) -> None:
        """Let the optimizer take step ``number`` by the gradients as they are."""
        factor = schedule(self.settings, number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr[group["role"]] * factor
        self.optimizer.step()
        self.gradients.hold()

    def state(self) -> Arrays:
        """See `Run.state`."""
        arrays: Arrays = {}
        for role, param in self.params.items():
            tensors = {"value": param, **self.optimizer.state.get(param, {})}
            if role in self.gradients.total:
                tensors["gradient"] = self.gradients.total[role]
            arrays |= {f"{role}.{key}": _array(value) for key, value in tensors.items()}
        return arrays | (self.scaler.arrays() if self.scaler else {})

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `Run.restore`."""
        if self.scaler:
            self.scaler.restore(arrays)
        for role, param in self.params.items():
            prefix = f"{role}."
            found = {name.removeprefix(prefix): torch.from_numpy(value) for name, value in arrays.items() if name.startswith(prefix)}
            with torch.no_grad():
                param.copy_(found.pop("value"))
                if "gradient" in found:
                    self.gradients.total[role].copy_(found.pop("gradient"))
            if found:
                self.optimizer.state[param] = _placed(found, param.device, self.settings)

    def gradient(self, steps: int) -> NDArray[np.float32] | None:
        """See `Run.gradient`."""
        return self.gradients.mean(steps)

    def _backward(self, window: Sequence[Batch]) -> tuple[torch.Tensor, int, float]:
        """Accumulate the gradient of the summed loss; the sum, its number of terms, and what the gradients are multiplied by."""
        total, count, scale = torch.zeros((), device=self.live.flat.device), 0, 1.0
        for batch in window:
            with autocast(self.settings, self.live.flat.device):
                loss = self.task.loss(self.live.model, batch)
            if loss.count:
                if self.scaler and not count:
                    scale = self.scaler.of_sum(loss.count * len(window))
                (loss.total * scale).backward()  # type: ignore[no-untyped-call]
                total += loss.total.detach()
                count += loss.count
        return total, count, scale

    def _overflows(self, number: int, total: torch.Tensor) -> bool:
        """Whether a finite loss has gradients that are not, by their scale alone as far as anyone knows. Raises as `Scaler.learn`."""
        if self.scaler is None or not bool(total.isfinite()):
            return False
        finite = self.gradients.finite()
        self.scaler.learn(number, finite)
        return not finite


def rate(settings: TrainSettings, method: Any, role: str) -> float:
    """Learning rate of ``role``: its own or the common one, times the method's ``lr_scale`` where it has one."""
    scale = getattr(method, "lr_scale", None)
    return settings.lr_by_role.get(role, settings.lr) * (scale(role) if scale else 1.0)


def schedule(settings: TrainSettings, number: int) -> float:
    """Factor on the learning rate in step ``number`` (from 0): linear warm-up, then the schedule over the steps that remain.

    No step has factor 0: warm-up starts at ``1 / (warmup + 1)`` and decay ends at ``1 / remaining``.
    """
    if number < settings.warmup:
        return (number + 1) / (settings.warmup + 1)
    done = (number - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + cos(pi * done))}[settings.schedule]


def _slices(live: Live, roles: frozenset[str]) -> dict[str, torch.nn.Parameter]:
    """One parameter per role, sharing storage with ``live.flat``, its gradient with ``live.grad``."""
    spans = live.spec.layout.role_spans
    unknown = sorted(roles - set(spans))
    if unknown or not roles:
        raise UpdateError(f"training: roles {unknown or 'none'} to train; the adapter has {sorted(spans)}")
    params = {role: torch.nn.Parameter(live.flat[spans[role]]) for role in sorted(roles)}
    for role, param in params.items():
        param.grad = live.grad[spans[role]]
    return params


def _array(value: Any) -> NDArray[Any]:
    """A copy on the host; the 8-bit optimizer counts its steps in a plain number."""
    return np.array(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value, copy=True)


def _placed(found: Mapping[str, torch.Tensor], device: torch.device, settings: TrainSettings) -> dict[str, Any]:
    """One parameter's state as its optimizer holds it."""
    state: dict[str, Any] = {key: value.to(device) for key, value in found.items()}
    return state | {"step": int(state["step"])} if settings.optimizer == "adamw8bit" else state


def optimizer_of(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that ``settings`` name, over groups of parameters with learning rates."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, weight_decay=settings.weight_decay)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def autocast(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to half precision on accelerators; CPUs multiply in it many times slower than in fp32."""
    half = half_of(settings, device)
    return nullcontext() if half is None else torch.autocast(device.type, half)
