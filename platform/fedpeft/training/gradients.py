"""What happens to the gradients of one optimizer step between backward and the optimizer: all on slices of the flat buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.tensors import Layout
from fedpeft.training.settings import TrainJob, TrainSettings

Slices = dict[str, torch.Tensor]


class Gradients:
    """Mean, mask, SCAFFOLD's correction, FedProx's term and clipping, in this order, over one parameter per trained role.

    ``params`` share their gradients' storage with the adapter; their values now are FedProx's anchor, and what masked
    values keep. Each of these costs a buffer only where the job asks for it.

    Raises:
        UpdateError: the job's mask or correction is not of the trained roles' layout.
    """

    def __init__(self, params: Mapping[str, torch.nn.Parameter], layout: Layout, settings: TrainSettings, job: TrainJob) -> None:
        self.params, self._settings, self._layout = params, settings, layout.subset(job.roles)
        self._mask, self._correction = self._cut(job.mask, "mask"), self._cut(job.correction, "correction")
        keep = bool(settings.proximal or self._mask)
        self._start: Slices = {role: param.detach().clone() for role, param in params.items()} if keep else {}
        self.total: Slices = {role: torch.zeros_like(param) for role, param in params.items()} if job.want_gradient else {}

    def clear(self) -> None:
        """Set all gradients to zero."""
        for param in self.params.values():
            gradient_of(param).zero_()

    def finite(self) -> bool:
        """Whether every value is; waits for the device."""
        return bool(torch.stack([gradient_of(param).isfinite().all() for param in self.params.values()]).all())

    def condition(self, count: float) -> torch.Tensor:
        """Make the gradients, of a mean loss times ``count``, ready for the optimizer; the norm before clipping, without a device sync."""
        for role, param in self.params.items():
            self._shape(role, param, gradient_of(param).div_(count))
        norms = [torch.linalg.vector_norm(gradient_of(param)) for param in self.params.values()]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if self._settings.clip:
            factor = torch.clamp(self._settings.clip / (norm + 1e-6), max=1.0)
            for param in self.params.values():
                gradient_of(param).mul_(factor)
        return norm

    def hold(self) -> None:
        """Put masked values back after the optimizer's step: neither decay nor moments of earlier steps may move them."""
        for role, mask in self._mask.items():
            param = self.params[role].data
            param.copy_(torch.where(mask, param, self._start[role]))

    def mean(self, steps: int) -> NDArray[np.float32] | None:
        """The mean raw gradient (P,) of ``steps`` steps; None unless the job wants it."""
        if not self.total:
            return None
        flat = torch.cat([self.total[role] for role in self._layout.role_spans]) / max(steps, 1)
        return np.asarray(flat.cpu().numpy(), np.float32)

    def _shape(self, role: str, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        if role in self._mask:
            gradient.mul_(self._mask[role])
        if role in self.total:
            self.total[role].add_(gradient)
        if role in self._correction:
            gradient.add_(self._correction[role])
        if self._settings.proximal:
            gradient.add_(param.detach() - self._start[role], alpha=self._settings.proximal)

    def _cut(self, flat: NDArray[Any] | None, name: str) -> Slices:
        """``flat`` by role, on the parameters' device."""
        if flat is None:
            return {}
        if flat.shape != (self._layout.size,):
            raise UpdateError(
                f"training: the job's {name} has shape {list(flat.shape)}, roles {sorted(self.params)} need [{self._layout.size}]"
            )
        spans = self._layout.role_spans
        return {role: torch.from_numpy(flat[spans[role]].copy()).to(param.device) for role, param in self.params.items()}


def gradient_of(param: torch.nn.Parameter) -> torch.Tensor:
    """The gradient, which is always there: it is a slice of the adapter's buffer."""
    assert param.grad is not None
    return param.grad
