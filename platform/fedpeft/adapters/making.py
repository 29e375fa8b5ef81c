"""The spec that a method has on a base, and its round-0 adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.adapters.drawing import draw
from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.bases.base import Base
from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import AdapterError
from fedpeft.methods.protocol import Method
from fedpeft.methods.spec import check_base as check_quantization
from fedpeft.tensors import Entry, Layout, Tensors

T = TypeVar("T")


def make_spec(task: str, base: Base, method: Method, head: HeadSpec) -> AdapterSpec:
    """The spec of ``method`` with ``head`` on ``base``; a meta base is enough. Raises `AdapterError` when nothing matches."""
    require_base(method, base)
    layout = _attached(base, method, head, lambda model: layout_of(method, model))
    return AdapterSpec(task, base.fingerprint.identity, base.spec.model, method, head, layout, base.family == "vision")


def initial(base: Base, spec: AdapterSpec, seed: int) -> Adapter:
    """The round-0 adapter: a function of ``spec`` and ``seed`` alone (and of the base's weights, for methods that need them).

    Raises:
        AdapterError: the spec is of another base, or the method needs weights and this is a meta base.
    """
    check_base(base, spec)
    drawn = draw(spec, seed, base.config)
    missing = [entry for entry, values in drawn.items() if values is None]
    if missing and base.device == "meta":
        raise AdapterError(
            f"adapter {spec.task}: {type(spec.method).__name__} starts from the base's weights; use load_base, not meta_base"
        )
    held = _attached(base, spec.method, spec.head, lambda model: _values(spec.method, model, missing)) if missing else {}
    named = {entry.name: held[entry.name] if values is None else values for entry, values in drawn.items()}
    return Adapter(spec, Tensors.from_named(spec.layout, named))


def check_base(base: Base, spec: AdapterSpec) -> None:
    """Raise `AdapterError` unless ``spec`` was made for the weights, tokenizer and template of ``base``, and trains on its precision."""
    if base.fingerprint.identity != spec.base:
        raise AdapterError(
            f"adapter {spec.task}: made for base {spec.base_model} ({spec.base[:12]}), this is {base.spec.model} "
            f"({base.fingerprint.identity[:12]}); load the base that the adapter names"
        )
    require_base(spec.method, base)


def require_base(method: Method, base: Base) -> None:
    """Refuse a quantization on which ``method`` fails or silently becomes another. Raises `AdapterError`."""
    from fedpeft.methods import SPECS
    from fedpeft.methods.blends import spec_of

    if method.kind in SPECS:
        check_quantization(method.kind, spec_of(method), base.spec.quantization)


def layout_of(method: Method, model: nn.Module) -> Layout:
    """The layout of what ``method`` trains on the ``model`` that it returned. Raises `AdapterError` when that is nothing."""
    entries = method.entries(model)
    if not entries:
        raise AdapterError(f"{type(method).__name__}: trains no tensor of {type(model).__name__}; check its targets")
    return Layout.of([Entry(role, name, tuple(parameter.shape)) for name, (role, parameter) in entries.items()])


def _attached(base: Base, method: Method, head: HeadSpec, look: Callable[[nn.Module], T]) -> T:
    """What ``look`` sees while the method is attached; the base is as before afterwards."""
    model = method.attach(base.shell(head), head)
    try:
        return look(model)
    finally:
        method.detach(model)
        base.model.requires_grad_(False)


def _values(method: Method, model: nn.Module, wanted: list[Entry]) -> dict[str, NDArray[np.float32]]:
    entries = method.entries(model)
    return {entry.name: entries[entry.name][1].detach().float().cpu().numpy().copy() for entry in wanted}
