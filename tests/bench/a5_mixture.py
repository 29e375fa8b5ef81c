"""A5: every row mixes K adapters by its own weights, ours beside a loop over adapters (X-LoRA's form) and the base alone, the floor.

The products of the adapters cannot be had for less than their arithmetic: ``least`` is what a step must multiply over what the base
alone does, so that ``limit / least`` is the largest ratio there can be where the base's products run at the same speed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from tests.bench._mixed import Bounds, Peft, Setting, adapters_of, bank_of, base_of, case_of, least_of, row, shown, step_of
from torch import nn

from fedpeft.mixtures import Gates

CASES = [(8, Setting(8, 32), 3.0), (16, Setting(16, 32), 4.5)]


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Forward and backward to adapters, weights fixed; seconds of the best round."""
    return list(rows(repeats))


def rows(repeats: int) -> Iterator[dict[str, object]]:
    """Row by row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = base_of()
        for experts, setting, goal in CASES:
            yield measured(base, Peft(base), experts, setting, goal=goal, repeats=2 * repeats)
    finally:
        torch.set_num_threads(threads)


def measured(
    base: Any, peer: Peft, experts: int, setting: Setting, *, goal: float, repeats: int, bounds: Bounds | None = None
) -> dict[str, object]:
    """One row; ours alone where the peer's adapters cannot be attached in time."""
    bounds = bounds or Bounds()
    adapters = adapters_of(base, experts, setting.rank)
    weights = torch.rand(setting.tasks, experts, generator=torch.Generator().manual_seed(2)).to(base.device)
    fault = peer.hold(adapters, bounds.attach)
    floor, hooks = copy.deepcopy(base.trunk), [] if fault else _loop(peer.model, list(adapters), weights)
    with bank_of(base, adapters) as bank:
        bank.use(Gates.weights(list(adapters), weights))
        steps = {"floor": step_of(base, floor, setting), "ours": step_of(base, bank.model.model, setting, bank.zero_grad)}
        if not fault:
            steps["peer"] = step_of(base, peer.model.base_model.model.model, setting, lambda: peer.model.zero_grad(set_to_none=True))
        seconds = least_of(steps, dict.fromkeys(steps, repeats), base.device, bounds.rounds)
    for hook in hooks:
        hook.remove()
    case = f"mixture_fwd_bwd K={experts} {case_of(base, setting)}"
    found = row("A5", case, seconds, f"ratio >= {goal}", base.device) | {"least": _least(floor, experts * setting.rank)}
    return found | {"note": fault} if fault else found


def _least(trunk: nn.Module, rank: int) -> float:
    """Multiplications of the linear layers with one factor pair of ``rank`` each, over those without: forward and all gradients."""
    sizes = [(module.in_features, module.out_features) for module in trunk.modules() if isinstance(module, nn.Linear)]
    return 1 + sum(3 * rank * (i + o) for i, o in sizes) / sum(2 * i * o for i, o in sizes)


def _loop(peft: Any, names: list[str], weights: torch.Tensor) -> list[Any]:
    """Make all adapters active, each one's rank activations scaled by its weight, layer by layer; the hooks that do it."""
    peft.base_model.set_adapter(names)
    return [
        module.lora_A[name].register_forward_hook(lambda _m, _x, out, i=place: out * weights[:, i, None, None].to(out.dtype))
        for module in peft.modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
        for place, name in enumerate(names)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    shown(rows(parser.parse_args().repeats))
