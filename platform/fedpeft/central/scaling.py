"""Loss scaling under ZeRO: one scale and one decision for all ranks, whatever the stage.

The scale is our own (`training.scaling`), so that it goes through our checkpoints. Stages 1 to 3 multiply the loss by it, divide gradients
before they clip them, and skip a step whose norm over all ranks is not finite; stage 0 steps with torch's optimizer, so all three
are done here. DeepSpeed's own fp16 mode would hold the adapters themselves in fp16.
"""

from __future__ import annotations

from typing import Any

import torch

from fedpeft.central.together import add_up
from fedpeft.central.world import World
from fedpeft.training.scaling import Scaler


def begin(zero: Any, scaler: Scaler | None) -> float:
    """Before the first backward of a step: what to multiply its losses by, where DeepSpeed does not."""
    if scaler is None:
        return 1.0
    if not hasattr(zero.optimizer, "override_loss_scale"):
        return scaler.scale
    zero.optimizer.custom_loss_scaler, zero.optimizer.external_loss_scale = True, scaler.scale
    return 1.0


def finish(zero: Any, scaler: Scaler | None, world: World) -> bool:
    """After the last backward of a step: let the engine step, unless gradients are not finite, scaled or not; whether it did."""
    if scaler is None or hasattr(zero.optimizer, "override_loss_scale"):
        zero.step()
        return not getattr(zero.optimizer, "overflow", False)
    finite = _divided(zero, scaler, world)
    if not finite:
        zero.optimizer.step = lambda: None  # the engine counts the step all the same, and drops the gradients
    try:
        zero.step()
    finally:
        zero.optimizer.__dict__.pop("step", None)
    return finite


def _divided(zero: Any, scaler: Scaler, world: World) -> bool:
    """Divide stage 0's gradients by the scale; False, on all ranks, when one of them is not finite."""
    params = [param for group in zero.optimizer.param_groups for param in group["params"] if param.grad is not None]
    wrong = torch.stack([~param.grad.isfinite().all() for param in params]).any().float()[None]
    add_up(world, wrong)
    for param in params:
        param.grad.div_(scaler.scale)
    return not bool(wrong)
