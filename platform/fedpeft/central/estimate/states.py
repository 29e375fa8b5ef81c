"""Bytes of what trains, under DeepSpeed's table: values, gradients, moments, buckets, and where each of them lies.

A bank of adapters holds its values and their gradients in one piece each (`mixtures.slabs`), which stay; stage 0 works in them. Stages 1
and 2 add a flat copy, and each rank's share of float32 values, gradients and moments; stage 3 keeps shares alone. (Rajbhandari et al. 2020,
arXiv 1910.02054; Rajbhandari et al. 2021, arXiv 2104.07857 for offloading.) That these are the bytes is tested against DeepSpeed itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.central.zero import offload_of, stage_of
from fedpeft.training.settings import TrainSettings

FULL = 4
"""Bytes of a float32."""
ALIGNED = 2
"""Flat groups of stages 1 and 2 are padded to so many values a rank."""
THRESHOLD = "stage3_param_persistence_threshold"
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    THRESHOLD: 100_000,
}
"""DeepSpeed's own, in values."""
SWAP_BUFFERS = 4
PARAM_BUFFERS, PARAM_BUFFER = 5, 100_000_000
"""What DeepSpeed pins to move optimizer states and parameters to and from disk."""
BLOCK_8BIT, SMALL_8BIT = 256, 4096
"""bitsandbytes keeps a float32 scale for so many codes, and float32 moments for tensors below so many values."""

Groups = Sequence[Sequence[int]]
"""The values of each trained tensor, by DeepSpeed's groups of parameters."""


@dataclass(frozen=True)
class States:
    """Bytes by name on the device, in host memory, and on disk."""

    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]


def states(table: Mapping[str, Any], groups: Groups, settings: TrainSettings, ranks: int) -> States:
    """What one rank holds of adapters whose tensors are ``groups``."""
    zero: Mapping[str, Any] = table.get("zero_optimization", {})
    stage, values = stage_of(table), sum(map(sum, groups))
    if stage == 0:
        moved = {"moments": moment_bytes(groups, settings)} | ({"bucket": FULL * values} if ranks > 1 else {})
        return States({"adapters": 2 * FULL * values, **moved}, {}, {})
    own = shares(stage, groups, ranks)
    held = {"values": FULL * sum(map(sum, own)), "gradients": FULL * sum(map(sum, own)), "moments": moment_bytes(own, settings)}
    device = {"adapters": (2 if stage == 3 else 3) * FULL * values, "bucket": bucket_bytes(zero, stage, values)}
    if stage == 1:
        device["adapters"] += FULL * values  # gradients are whole until they are reduced
    if stage == 3:
        device["adapters"] += FULL * sum(size for group in groups for size in group if size <= number(zero, THRESHOLD))
    return _placed(device, held, offload_of(zero, "optimizer"))


def shares(stage: int, groups: Groups, ranks: int) -> list[list[int]]:
    """The values of each tensor that the optimizer steps on, on one rank: a part of each group, in stage 3 of each tensor."""
    if stage == 0:
        return [list(group) for group in groups]
    if stage == 3:
        return [[sum(-(-size // ranks) for size in group)] for group in groups]
    return [[-(-sum(group) // (ALIGNED * ranks)) * ALIGNED] for group in groups]


def moment_bytes(groups: Groups, settings: TrainSettings) -> int:
    """AdamW has two moments in float32, or in a code and a share of a scale; SGD one, when it has momentum."""
    sizes = [size for group in groups for size in group]
    if settings.optimizer == "sgd":
        return FULL * sum(sizes) if settings.momentum else 0
    if settings.optimizer == "adamw":
        return 2 * FULL * sum(sizes)
    return sum(2 * FULL * size if size < SMALL_8BIT else 2 * (size + FULL * -(-size // BLOCK_8BIT)) for size in sizes)


def bucket_bytes(zero: Mapping[str, Any], stage: int, values: int) -> int:
    """Where gradients are laid side by side before ranks add them up: two of them where adding overlaps with the backward pass."""
    twice = stage < 3 and bool(zero.get("overlap_comm"))
    size = min(number(zero, "reduce_bucket_size"), values)
    return FULL * size * (2 if twice else 1) if zero.get("contiguous_gradients", True) else 0


def number(zero: Mapping[str, Any], key: str) -> int:
    """A size of DeepSpeed's table in values, or DeepSpeed's own."""
    found = zero.get(key, DEFAULTS[key])
    return DEFAULTS[key] if found == "auto" else int(found)


def _placed(device: dict[str, int], held: dict[str, int], place: str) -> States:
    if place == "none":
        return States(device | held, {}, {})
    if place == "cpu":
        return States(device, held, {})
    buffers = SWAP_BUFFERS * held["values"]
    return States(device, {"gradients": held["gradients"], "swap buffers": buffers}, {"values": held["values"], "moments": held["moments"]})
