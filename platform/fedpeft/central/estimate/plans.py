"""One way to run a job, a DeepSpeed table, in bytes: what each rank holds on its GPU, in host memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft.adapters import make_spec
from fedpeft.bases import module_roles, outline_base
from fedpeft.bases.spec import HALF, QUANTIZED, Quantization
from fedpeft.central.estimate.activations import Activations, Shape, activations, shape_of
from fedpeft.central.estimate.states import (
    PARAM_BUFFER,
    PARAM_BUFFERS,
    THRESHOLD,
    Groups,
    number,
    states,
)
from fedpeft.central.estimate.weights import Weights, weights_of
from fedpeft.central.zero import offload_of, stage_of
from fedpeft.errors import BaseError, ConfigError

if TYPE_CHECKING:
    from fedpeft.adapters.spec import AdapterSpec
    from fedpeft.bases.base import Base
    from fedpeft.training.config import CentralConfig
    from fedpeft.training.settings import TrainSettings

GIB = 1 << 30
SLACK = 1.05
"""What the allocator holds over what is allocated, on the GPU and for pinned pages."""
CONTEXT, PROCESS = int(0.6 * GIB), 3 * GIB
"""CUDA's context and libraries: on the GPU, and with Python in host memory."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank by name, of a stage and its offloads; ``loading`` is what the GPU holds before anything is divided."""

    stage: int
    offload: str
    offload_params: str
    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    loading: int = 0

    @property
    def name(self) -> str:
        """As people say it."""
        parts = [f"optimizer {self.offload}"] * (self.offload != "none") + [f"params {self.offload_params}"] * (
            self.offload_params != "none"
        )
        return f"stage {self.stage}" + (f", {', '.join(parts)}" if parts else "")

    @property
    def allocated(self) -> int:
        """Peak of allocated memory on the GPU."""
        return max(sum(self.device.values()), self.loading)

    @property
    def gpu(self) -> int:
        """What the GPU must have: with the allocator's slack and CUDA's context."""
        return int(self.allocated * SLACK) + CONTEXT

    @property
    def cpu(self) -> int:
        """What the host must have for this rank."""
        return int(sum(self.host.values()) * SLACK) + PROCESS

    @property
    def files(self) -> int:
        """What the disk must have for this rank."""
        return sum(self.disk.values())


@dataclass(frozen=True)
class Room:
    """What a machine has: bytes of each GPU, bytes of host memory and the number of ranks that share it; None: not known."""

    gpu: int | None = None
    cpu: int | None = None
    ranks: int = 1

    def holds(self, plan: Plan) -> bool:
        """Whether ``plan`` fits; what is not known is not asked."""
        return (self.gpu is None or plan.gpu <= self.gpu) and (self.cpu is None or plan.cpu * self.ranks <= self.cpu)


@dataclass(frozen=True)
class Estimate:
    """What the memory of a job depends on, the same for every plan."""

    weights: Weights
    shape: Shape
    groups: Groups
    settings: TrainSettings
    tokens: int
    rows: int
    ranks: int
    kind: Quantization

    @property
    def quantized(self) -> bool:
        """Whether linear layers hold codes."""
        return self.kind in QUANTIZED


UNKNOWN = {"seq2seq": "an encoder-decoder", "vision": "a vision encoder"}
"""Families whose steps were not measured."""


def estimated(config: CentralConfig, ranks: int, device: str = "cuda") -> Estimate:
    """What is known of ``config`` on ``ranks`` ranks without its weights or rows: every row is taken for ``base.max_tokens`` long.

    Raises:
        BaseError: the base has no ``config.json``, or one that cannot be built, or is of a family that was not measured.
        AdapterError: the method does not fit the base.
        ConfigError: the ranks cannot share a batch.
    """
    if config.training.batch_size % ranks:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size} cannot be divided among {ranks} ranks; set a multiple of {ranks}"
        )
    base, width = outline_base(config.base), width_of(config.base.quantization, device)
    if base.family in UNKNOWN:
        raise BaseError(
            f"base {config.base.model}: what {UNKNOWN[base.family]} keeps for its backward pass is not known, so there is no number to "
            "give; train a few steps and read the peak that fedpeft central train reports"
        )
    heads = {entry.task.head for entry in config.tasks.values()}
    made = {head: make_spec(config.name, base, config.method, head) for head in heads}
    specs = [made[entry.task.head] for entry in config.tasks.values()]
    specs += [make_spec(config.name, base, config.shared_method or config.method, specs[0].head)] if config.shared else []
    groups = [[entry.size for entry in spec.layout.entries if entry.role == role] for spec in specs for role in sorted(spec.layout.roles)]
    count = config.training.batch_size // ranks
    return Estimate(
        weights_of(base, width),
        shape_of(base, config.training, width, _ranks(base, specs)),
        groups,
        config.training,
        count * config.base.max_tokens,
        1 if base.family == "causal" and config.training.packing else count,
        ranks,
        config.base.quantization,
    )


def width_of(quantization: str, device: str) -> int:
    """Bytes of a value that is not quantized (see `bases.quantize.compute_dtype`)."""
    return 2 if quantization in HALF or (quantization != "none" and device == "cuda") else 4


def plan_of(estimate: Estimate, table: Mapping[str, Any]) -> Plan:
    """The bytes of ``estimate`` under DeepSpeed's ``table``."""
    zero: Mapping[str, Any] = table.get("zero_optimization", {})
    stage, place = stage_of(table), offload_of(zero, "param")
    held = states(table, estimate.groups, estimate.settings, estimate.ranks)
    step = activations(estimate.shape, estimate.settings, estimate.tokens, estimate.rows)
    device, host, disk = _base(estimate, zero, stage, place)
    loading = estimate.weights.whole if stage == 3 and estimate.quantized else 0
    device |= held.device | {"activations": step.kept, "layer or loss at work": step.working + estimate.weights.dense}
    return Plan(stage, offload_of(zero, "optimizer"), place, device, host | held.host | _resting(step), disk | held.disk, loading)


def _base(estimate: Estimate, zero: Mapping[str, Any], stage: int, place: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The base on the device, in host memory, and on disk."""
    weights = estimate.weights
    if stage < 3:
        return {"base": weights.whole}, {}, {}
    part = weights.part(estimate.ranks, number(zero, THRESHOLD))
    live = {"gathered layers": weights.live(number(zero, "stage3_max_live_parameters"))}
    if place == "none":
        return {"base": part} | live, {}, {}
    if place == "cpu":
        return live, {"base": part}, {}
    return live, {"swap buffers of the base": PARAM_BUFFERS * PARAM_BUFFER * estimate.shape.width}, {"base": part}


def _resting(step: Activations) -> dict[str, int]:
    return {"activations": step.host} if step.host else {}


def _ranks(base: Base, specs: list[AdapterSpec]) -> dict[str, int]:
    """Of each linear layer, the ranks of all adapters together."""
    roles, found = module_roles(base.model), dict[str, int]()
    downs = [entry for spec in specs for entry in spec.layout.entries if entry.role == "A"]
    for name in (*roles["attention"], *roles["mlp"]):
        found[name] = sum(entry.shape[0] for entry in downs if f"{name}." in entry.name)
    return found
