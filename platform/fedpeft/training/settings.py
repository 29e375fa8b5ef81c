"""What a training job is told and what it answers: plain frozen values, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import ConfigError
from fedpeft.privacy.accounting import Event

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Optimizer = Literal["adamw", "adamw8bit", "sgd"]


@dataclass(frozen=True)
class TrainSettings:
    """How one round of local training runs; equal settings, seed, rows and start give the same bits on one machine.

    ``lr_by_role`` overrides ``lr`` for single roles (``A``, ``B``, ``head``, ...) and is absolute; ``warmup`` counts optimizer
    steps; ``accumulate`` is micro-batches per optimizer step; ``clip`` bounds the global gradient norm (0: off); ``proximal``
    is FedProx's mu (Li et al. 2020, arXiv 1812.06127, eq. 2). FedProx and SCAFFOLD are published with ``optimizer = "sgd"``,
    which takes ``momentum`` and counts ``weight_decay`` as gradient; AdamW decouples it. With ``base_dropout`` the frozen
    model's own dropout is on as well; off is the default, because it regularises weights that do not train and costs 15 times
    the adapter's own work on a CPU. ``precision = "bf16"`` is autocast on devices that multiply bf16 fast, ``"fp16"`` for cards
    that have only that (Turing: T4, RTX 20xx), with the loss scaled (`scaling`); such a card takes ``"bf16"`` for ``"fp16"``, and a CPU
    goes on in fp32.

    Memory and speed: ``checkpoint_activations`` keeps one hidden state a layer and computes the rest again in the backward pass,
    ``offload_activations`` keeps even these in host memory; ``packing`` lays a language model's sequences one after the other in one
    row, without padding and without attention from one to another, where the model can; ``chunked_loss`` never holds more than a part
    of a language model's logits; ``optimizer = "adamw8bit"`` (Dettmers et al. 2022, arXiv 2110.02861) holds moments in a byte each;
    ``fused_kernels`` are Liger's, on CUDA where that package is installed.
    """

    steps: Count = 20
    batch_size: Count = 16
    lr: Rate = 1e-3
    lr_by_role: Mapping[str, Rate] = field(default_factory=dict)
    weight_decay: Amount = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    accumulate: Count = 1
    clip: Amount = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint_activations: bool = False
    offload_activations: bool = False
    packing: bool = True
    chunked_loss: bool = True
    fused_kernels: bool = True
    base_dropout: bool = False
    save_every: Count = 10
    proximal: Amount = 0.0
    optimizer: Optimizer = "adamw"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("weight_decay", "warmup", "clip", "proximal"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be finite and not negative")
        for name, rate in (("lr", self.lr), *((f"lr_by_role.{role}", rate) for role, rate in self.lr_by_role.items())):
            if not (isfinite(rate) and rate > 0):
                raise ConfigError(f"training.{name} is {rate}; it must be finite and above 0")
        if self.offload_activations and not self.checkpoint_activations:
            raise ConfigError("training.offload_activations moves what checkpoint_activations = true keeps; set both or neither")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.offload_activations and not self.checkpoint_activations:
            raise ConfigError("training.offload_activations moves what checkpoint_activations = true keeps; set both or neither")
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(
                f"training.momentum = {self.momentum} and training.optimizer = {self.optimizer!r}: "
                "AdamW has moments of its own; set optimizer = 'sgd'"
            )

    def travel(self, role: str) -> float:
        """About how far one value of ``role`` moves in a round at most; 0 where the settings bound nothing.

        AdamW's steps are of about ``lr`` where a gradient keeps its sign (Kingma & Ba 2015, section 2.1), and clipped SGD's below it.
        """
        longest = self.steps * self.lr_by_role.get(role, self.lr)
        if self.optimizer != "sgd":
            return longest
        return longest * self.clip / (1 - self.momentum)

    @property
    def digest(self) -> str:
        """SHA-256 over every setting that can change the result; how often a checkpoint is written is not one of them."""
        table = asdict(self) | {"lr_by_role": dict(sorted(self.lr_by_role.items()))}
        del table["save_every"]
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TrainJob:
    """One job: the roles that train now, the seed of order and dropout, the checkpoint's folder, who hears of progress.

    ``progress`` is called after each step with the number of steps done and the mean loss of that step, ``saved`` after each
    checkpoint with the number of steps done and the job's digest. ``mask`` (P,) is True
    where values may move, ``correction`` (P,) is added to every gradient (SCAFFOLD), ``want_gradient`` asks for the mean raw
    gradient; (P,) is the layout of ``roles``.
    """

    roles: frozenset[str]
    seed: int
    checkpoint: Path | None = None
    progress: Callable[[int, float], None] | None = None
    mask: NDArray[np.bool_] | None = None
    correction: NDArray[np.float32] | None = None
    want_gradient: bool = False
    saved: Callable[[int, str], None] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over all that can change the result."""
        hasher = hashlib.sha256(repr((sorted(self.roles), self.seed, self.want_gradient)).encode())
        for name, array in (("mask", self.mask), ("correction", self.correction)):
            if array is not None:
                hasher.update(f"{name} {array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()


@dataclass(frozen=True)
class TrainResult:
    """What was done, resumed parts included: ``loss_sum`` over ``count`` loss terms, examples, tokens (no padding), seconds.

    ``gradient`` (P,) is the mean over the steps of the gradient as the loss gave it: before correction, FedProx and clipping.
    ``skipped`` steps, which count among the others, were not done, since their gradients overflowed fp16.
    With ``private``, what the job cost an accountant, it protected its examples: then loss, examples and tokens are zero here,
    since nothing protects them, and ``gradient`` is the noisy one.
    """

    steps: int
    loss_sum: float
    count: int
    examples: int
    tokens: int
    seconds: float
    resumed_from: int
    gradient: NDArray[np.float32] | None = None
    private: Event | None = None
    skipped: int = 0

    @property
    def loss(self) -> float:
        """Mean loss per term over the whole job."""
        return self.loss_sum / max(self.count, 1)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of wall-clock time."""
        return self.tokens / max(self.seconds, 1e-9)
