"""An adapter at work on a warm base: every trained parameter is a view of one flat buffer, every gradient of another."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType

import numpy as np
import torch
from torch import nn

from fedpeft.adapters.making import check_base, layout_of
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.bases.base import Base
from fedpeft.bases.vision import require_forward
from fedpeft.errors import AdapterError
from fedpeft.tensors import Tensors


class Live:
    """The model with the adapter of ``spec`` attached; leaving the ``with`` block takes it off again.

    ``flat`` and ``grad`` are float32 (P,) on the base's device, in layout order. Zero gradients with ``grad.zero_()``, never by setting
    them to None, or they stop being views. Right after `attach` the values are zeros: `load` comes first.
    """

    def __init__(self, base: Base, spec: AdapterSpec, model: nn.Module) -> None:
        self.base = base
        self.spec = spec
        self.model = model
        entries = spec.method.entries(model)
        found = layout_of(spec.method, model)
        if found != spec.layout:
            raise AdapterError(f"adapter {spec.task}: {_difference(spec, found.names)}; was the adapter made for another base or version?")
        self.flat = torch.zeros(spec.layout.size, dtype=torch.float32, device=base.device)
        self.grad = torch.zeros_like(self.flat)
        self.parameters: dict[str, nn.Parameter] = {name: entries[name][1] for name in spec.layout.names}
        self._own = {name: parameter.data for name, parameter in self.parameters.items()}
        for entry in spec.layout.entries:
            span, parameter = spec.layout.spans[entry.name], self.parameters[entry.name]
            parameter.data = self.flat[span].view(entry.shape)
            parameter.grad = self.grad[span].view(entry.shape)

    @staticmethod
    def attach(base: Base, spec: AdapterSpec) -> Live:
        """Put the adapter on ``base``: milliseconds, nothing of the base is copied.

        Raises:
            AdapterError: the spec is of another base, or its layout is not what the method has here, or the base does not run with it.
            BaseError: another adapter is attached, or this is a meta base.
        """
        check_base(base, spec)
        if base.device == "meta":
            raise AdapterError(f"adapter {spec.task}: base {base.spec.model} was built without weights; use load_base")
        model = spec.method.attach(base.shell(spec.head), spec.head)
        try:
            require_forward(base, spec.method.kind, model)
            live = Live(base, spec, model)
        except BaseException:
            _take_off(base, spec, model)
            raise
        base.holder = spec.task
        live.train_roles(spec.layout.roles)
        return live

    def load(self, tensors: Tensors) -> None:
        """Set all values: one copy. Raises `AdapterError` when ``tensors`` is of another layout."""
        if tensors.layout is not self.spec.layout and tensors.layout != self.spec.layout:
            raise AdapterError(
                f"adapter {self.spec.task}: the tensors to load are of another layout; was it made for another base or rank?"
            )
        if self.flat.device.type == "cpu":
            np.copyto(self.flat.numpy(), tensors.flat)
        else:
            self.flat.copy_(torch.from_numpy(tensors.flat if tensors.flat.flags.writeable else tensors.flat.copy()))

    def read(self) -> Tensors:
        """All values: one copy, which later steps do not change."""
        host = self.flat.numpy().copy() if self.flat.device.type == "cpu" else self.flat.cpu().numpy()
        return Tensors(self.spec.layout, host)

    def train_roles(self, roles: Collection[str]) -> None:
        """Only tensors of ``roles`` get gradients from now on; all gradients become zero. Raises `AdapterError` on an unknown role."""
        unknown = sorted(set(roles) - self.spec.layout.roles)
        if unknown:
            raise AdapterError(f"adapter {self.spec.task}: has no roles {unknown}; its roles are {sorted(self.spec.layout.roles)}")
        for entry in self.spec.layout.entries:
            self.parameters[entry.name].requires_grad_(entry.role in roles)
        self.grad.zero_()

    def detach(self) -> None:
        """Take the adapter off: the base is as before `attach`, bit for bit. Doing it twice does nothing."""
        if not self._own:
            return
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self._own[name]
        self._own = {}
        _take_off(self.base, self.spec, self.model)

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()


def _take_off(base: Base, spec: AdapterSpec, model: nn.Module) -> None:
    try:
        spec.method.detach(model)
    finally:
        base.model.requires_grad_(False).eval()
        base.holder = None


def _difference(spec: AdapterSpec, found: Collection[str]) -> str:
    missing, extra = sorted(set(spec.layout.names) - set(found)), sorted(set(found) - set(spec.layout.names))
    if missing or extra:
        return f"the spec has {missing[:2]} that the model lacks, the model has {extra[:2]} that the spec lacks"
    return "shapes or roles differ from those of the model"
