"""Which stage and offload to take: the fastest that fits, and if none does, which setting to change first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedpeft.bases.spec import QUANTIZED, Quantization
from fedpeft.central.estimate.plans import Estimate, Plan, Room, plan_of
from fedpeft.central.zero import stage_json
from fedpeft.training.config import DeepSpeed
from fedpeft.training.settings import Optimizer, TrainSettings

Changes = Mapping[str, Any]
DISK = "nvme"
LEVERS: tuple[Changes, ...] = (
    {},
    {"checkpoint_activations": True},
    {"checkpoint_activations": True, "offload_activations": True},
    {"checkpoint_activations": True, "offload_activations": True, "optimizer": "adamw8bit"},
)
"""Settings of training that take memory down, the cheapest first; the last is for `adamw` alone."""


@dataclass(frozen=True)
class Advice:
    """What to take, with the ``changes`` of the job's file that it needs; None when nothing fits, and then ``reason`` says what would."""

    plan: Plan | None
    changes: Changes
    reason: str

    @property
    def settings(self) -> dict[str, object]:
        """What to write into the job's file, by dotted key."""
        if self.plan is None:
            return {}
        speed = {"stage": self.plan.stage, "offload": self.plan.offload, "offload_params": self.plan.offload_params}
        return {f"deepspeed.{name}": value for name, value in speed.items()} | {f"training.{name}": on for name, on in self.changes.items()}


def places(kind: Quantization, optimizer: Optimizer) -> tuple[tuple[int, str, str], ...]:
    """Stage, where optimizer states lie, and where parameters lie: all are what `zero.zero_of` takes of a base of ``kind``.

    The fastest first: stage 2 before 0 and 1, which hold more; stage 3 gathers the base in every pass; then the host, then the disk.
    """
    found = [(2, "none", "none"), (0, "none", "none"), (1, "none", "none"), (2, "cpu", "none"), (3, "none", "none"), (3, "cpu", "none")]
    moved = [(3, "none", "cpu"), (3, "cpu", "cpu"), (3, DISK, "none"), (3, DISK, "cpu"), (3, DISK, DISK)]
    params = {"none"} if kind in QUANTIZED else {"none", "cpu", DISK} if kind == "bf16" else {"none", "cpu"}
    return tuple(found + [place for place in moved if place[2] in params and (place[1] != DISK or optimizer != "adamw8bit")])


def settings_of(place: tuple[int, str, str]) -> DeepSpeed:
    """``place`` as a job's file says it."""
    stage, optimizer, params = place
    folder = "offload" if DISK in (optimizer, params) else None
    return DeepSpeed.model_validate({"stage": stage, "offload": optimizer, "offload_params": params, "nvme": folder})


def plans(estimate: Estimate) -> list[Plan]:
    """All ways, in the order of `places`."""
    return [
        plan_of(estimate, {"zero_optimization": stage_json(settings_of(place))})
        for place in places(estimate.kind, estimate.settings.optimizer)
    ]


def advise(estimate: Estimate, room: Room) -> Advice:
    """The fastest plan that fits, without changes of training where one does, else with levers of memory."""
    for changes, found in _tried(estimate):
        fitting = [plan for plan in _ordered(found, estimate.ranks) if room.holds(plan)]
        if fitting:
            return Advice(fitting[0], dict(changes), "fits with less kept" if changes else "fits")
    return Advice(None, {}, _why(estimate, room))


def _tried(estimate: Estimate) -> Iterator[tuple[Changes, list[Plan]]]:
    for changes in _levers(estimate.settings):
        new = {name: value for name, value in changes.items() if getattr(estimate.settings, name) != value}
        if new or not changes:
            yield new, plans(replace(estimate, settings=replace(estimate.settings, **new)))


def _levers(settings: TrainSettings) -> tuple[Changes, ...]:
    return LEVERS if settings.optimizer == "adamw" else LEVERS[:-1]


def _ordered(found: list[Plan], ranks: int) -> list[Plan]:
    """Alone, stage 0 is fastest: there is nobody to share with."""
    return sorted(found, key=lambda plan: plan.stage != 0) if ranks == 1 else found


def _why(estimate: Estimate, room: Room) -> str:
    """What keeps the smallest plan from fitting, and the next step."""
    least = min(plans(replace(estimate, settings=replace(estimate.settings, **_levers(estimate.settings)[-1]))), key=lambda plan: plan.gpu)
    largest = max(least.device, key=lambda name: least.device[name])
    where = "the GPU" if room.gpu is not None and least.gpu > room.gpu else "host memory"
    ways = {
        "base": "set base.quantization = 'nf4', or take more ranks",
        "gathered layers": "lower stage3_max_live_parameters in a DeepSpeed JSON",
        "activations": "lower training.batch_size and raise training.accumulate, or lower base.max_tokens",
        "layer or loss at work": "lower training.batch_size and raise training.accumulate, or lower base.max_tokens",
        "adapters": "lower method.r, or train fewer tasks at once",
    }
    return f"even {least.name} is too large for {where}, mostly by {largest}; {ways.get(largest, ways['base'])}"
