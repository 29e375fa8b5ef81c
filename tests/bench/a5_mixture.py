"""A5: every row mixes K adapters by its own weights, ours beside a loop over adapters (X-LoRA's form) and the base alone, the floor."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from tests.bench._mixed import Setting, adapters_of, bank_of, base_of, least_of, peft_of, row, step_of

from fedpeft.mixtures import Gates

CASES = [(8, Setting(8, 32), 3.0), (16, Setting(16, 32), 4.5)]


def run(repeats: int = 5, device: str = "cpu") -> list[dict[str, object]]:
    """Forward and backward to adapters, weights fixed; seconds of the best round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = base_of(device)
        return [_row(base, experts, Setting(s.tasks, s.tokens, s.rank, True, device), goal, repeats) for experts, s, goal in CASES]
    finally:
        torch.set_num_threads(threads)


def _row(base: Any, experts: int, setting: Setting, goal: float, repeats: int) -> dict[str, object]:
    adapters = adapters_of(base, experts, setting.rank)
    weights = torch.rand(setting.tasks, experts, generator=torch.Generator().manual_seed(2)).to(setting.device)
    peer = _looped(base, adapters, weights)
    floor = copy.deepcopy(base.trunk)
    with bank_of(base, adapters) as bank:
        bank.use(Gates.weights(list(adapters), weights))
        steps = {
            "floor": step_of(floor, setting),
            "ours": step_of(bank.model.model, setting, bank.zero_grad),
            "peer": step_of(peer.base_model.model.model, setting, lambda: peer.zero_grad(set_to_none=True)),
        }
        seconds = least_of(steps, dict.fromkeys(steps, 2 * repeats), setting.device)
    case = f"mixture_fwd_bwd K={experts} rows={setting.tasks} S={setting.tokens} r={setting.rank}"
    return row("A5", case if setting.device == "cpu" else f"{case} {setting.device}", seconds, f"ratio >= {goal}", setting.device)


def _looped(base: Any, adapters: dict[str, Any], weights: torch.Tensor) -> Any:
    """peft with all adapters active, each one's rank activations scaled by its weight, layer by layer."""
    peft = peft_of(base, adapters)
    peft.base_model.set_adapter(list(adapters))
    for module in peft.modules():
        for place, name in enumerate(adapters):
            if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict):
                module.lora_A[name].register_forward_hook(lambda _m, _x, out, i=place: out * weights[:, i, None, None].to(out.dtype))
    return peft


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for found in run(arguments.repeats, "cuda" if arguments.cuda else "cpu"):
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()})
