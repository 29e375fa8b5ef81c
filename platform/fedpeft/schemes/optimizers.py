"""Server optimizers: the mean delta is taken as a pseudo-gradient (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

State is a plain ``dict[str, array]`` with keys such as ``B.m``: moments belong to a role and move only in the rounds in
which that role moves. All arithmetic is elementwise float32, so equal inputs give equal bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import numpy as np
import safetensors.numpy as safe
from pydantic import Field
from safetensors import SafetensorError

from fedpeft.errors import StorageError, UpdateError
from fedpeft.tensors import Flat, Tensors

State = dict[str, Flat]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Rule = Callable[[Flat, Flat], Flat]


class ServerOptimizer(Protocol):
    """How the coordinator turns the mean delta into a step."""

    kind: ClassVar[str]

    def step(self, delta: Tensors, state: State) -> tuple[Tensors, State]:
        """The step to add to the current values, and the next state. Raises `UpdateError` when ``state`` is another adapter's."""
        ...


@dataclass(frozen=True)
class SGD:
    """``x += lr Δ``; with lr 1 it is plain federated averaging."""

    lr: Positive = 1.0
    kind: ClassVar[str] = "sgd"

    def step(self, delta: Tensors, state: State) -> tuple[Tensors, State]:
        """Stateless."""
        return delta.scaled(self.lr), state


@dataclass(frozen=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): ``m = beta m + Δ; x += lr m``."""

    lr: Positive = 1.0
    beta: Decay = 0.9
    kind: ClassVar[str] = "momentum"

    def step(self, delta: Tensors, state: State) -> tuple[Tensors, State]:
        """State: ``<role>.m``."""
        out, after = Tensors.zeros(delta.layout), dict(state)
        for role, span in delta.layout.role_spans.items():
            value = delta.flat[span]
            after[f"{role}.m"] = _moment(state, f"{role}.m", value, 0.0) * np.float32(self.beta) + value
            out.flat[span] = after[f"{role}.m"] * np.float32(self.lr)
        return out, after


@dataclass(frozen=True)
class Adam:
    """FedAdam: ``m = b1 m + (1-b1) Δ; v = b2 v + (1-b2) Δ²; x += lr m / (√v + tau)``; v starts at tau², no bias correction."""

    lr: Positive = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3
    kind: ClassVar[str] = "adam"

    def step(self, delta: Tensors, state: State) -> tuple[Tensors, State]:
        """State: ``<role>.m``, ``<role>.v``."""
        keep, new = np.float32(self.beta2), np.float32(1.0 - self.beta2)
        return _adaptive(self, delta, state, lambda v, square: keep * v + new * square)


@dataclass(frozen=True)
class Yogi:
    """FedYogi: as `Adam` with ``v -= (1-b2) Δ² sign(v - Δ²)``, so that v grows no faster than it shrinks."""

    lr: Positive = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3
    kind: ClassVar[str] = "yogi"

    def step(self, delta: Tensors, state: State) -> tuple[Tensors, State]:
        """State: ``<role>.m``, ``<role>.v``."""
        new = np.float32(1.0 - self.beta2)
        return _adaptive(self, delta, state, lambda v, square: v - new * square * np.sign(v - square))


@dataclass(frozen=True)
class Adagrad:
    """FedAdagrad: as `Adam` with ``v += Δ²``; the paper runs it with ``beta1 = 0``."""

    lr: Positive = 0.01
    beta1: Decay = 0.0
    tau: Positive = 1e-3
    kind: ClassVar[str] = "adagrad"

    def step(self, delta: Tensors, state: State) -> tuple[Tensors, State]:
        """State: ``<role>.m``, ``<role>.v``."""
        return _adaptive(self, delta, state, lambda v, square: v + square)


def pack_state(state: State) -> bytes:
    """``state`` as safetensors bytes; equal states give equal bytes."""
    data: bytes = safe.save({name: np.ascontiguousarray(state[name], np.float32) for name in sorted(state)})
    return data


def unpack_state(data: bytes) -> State:
    """Inverse of `pack_state`, bit for bit. Raises `StorageError` when ``data`` is torn."""
    try:
        state: State = safe.load(data)
    except SafetensorError as fault:
        raise StorageError(f"optimizer state of {len(data)} bytes cannot be read ({fault}); resume from an earlier round") from None
    return state


def _adaptive(how: Adam | Yogi | Adagrad, delta: Tensors, state: State, second: Rule) -> tuple[Tensors, State]:
    out, after = Tensors.zeros(delta.layout), dict(state)
    keep, new, tau = np.float32(how.beta1), np.float32(1.0 - how.beta1), np.float32(how.tau)
    for role, span in delta.layout.role_spans.items():
        value = delta.flat[span]
        m = keep * _moment(state, f"{role}.m", value, 0.0) + new * value
        v = second(_moment(state, f"{role}.v", value, how.tau**2), value * value)
        out.flat[span] = np.float32(how.lr) * m / (np.sqrt(v) + tau)
        after |= {f"{role}.m": m, f"{role}.v": v}
    return out, after


def _moment(state: State, key: str, like: Flat, start: float) -> Flat:
    if key not in state:
        return np.full_like(like, start)
    if state[key].shape != like.shape:
        raise UpdateError(f"optimizer state {key}: {state[key].size} values, this adapter has {like.size}; it belongs to another adapter")
    return state[key]
