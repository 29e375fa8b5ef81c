"""A1, A1b, A2, A3: one batch of many tasks, ours beside peft's two ways, over the base alone; ``--cuda`` runs the same on a GPU.

A1: training one row per task; the peer trains one task after another (``set_adapter``). A2: the peer's mixed batch (``adapter_names``),
which raises in training mode and is forced by eval mode. A3: forward only, against ``adapter_names``. The floor is the
frozen base alone, forward and input gradient. ``A1s`` rows compare with one adapter on all rows.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from tests.bench._mixed import Setting, Step, adapters_of, autocast, bank_of, base_of, least_of, peft_of, row, step_of

from fedpeft.mixtures import Gates

TRAIN = [(Setting(8, 32), 2.7), (Setting(32, 32), 2.9), (Setting(128, 32), 5.8)]
LONG = [(Setting(8, 128), 0.0), (Setting(32, 64, 16), 0.0)]
SHARE_GOAL, INFER_GOAL, SINGLE_GOAL = 1.11, 1.10, 1.25


def run(repeats: int = 5, device: str = "cpu", most: int = 128) -> list[dict[str, object]]:
    """The rows up to ``most`` tasks; peers of 128 tasks run once, as one step takes them half a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = base_of(device)
        return [
            found
            for setting, goal in (*TRAIN, *LONG)
            if setting.tasks <= most
            for found in _measured(base, _on(setting, device), goal, repeats)
        ]
    finally:
        torch.set_num_threads(threads)


def _on(setting: Setting, device: str, backward: bool = True) -> Setting:
    return Setting(setting.tasks, setting.tokens, setting.rank, backward, device)


def _rounds(setting: Setting, repeats: int) -> dict[str, int]:
    """More rounds where a step is short, fewer for peers whose step grows with the square of the tasks."""
    own = max(3, 3 * repeats if setting.tasks * setting.tokens <= 1024 else repeats)
    peer = repeats if setting.tasks <= 8 else max(1, repeats // 2) if setting.tasks <= 32 else 1
    return {"floor": own, "ours": own, "single": own, "sequential": peer, "mixed": peer}


def _measured(base: Any, setting: Setting, goal: float, repeats: int) -> list[dict[str, object]]:
    adapters = adapters_of(base, setting.tasks, setting.rank)
    peft, case = peft_of(base, adapters), f"{setting.label} {base.config.hidden_size}x{base.config.num_hidden_layers}"
    found = _trained(base, adapters, peft, setting, repeats)
    rows = _rows(setting, found, goal, case)
    if not goal:
        return rows
    forward = _on(setting, setting.device, backward=False)
    found = _inferred(base, adapters, peft, forward, repeats)
    return [*rows, row("A3", f"mt_infer_mixed {case}", found | {"peer": found["mixed"]}, f"overhead <= {INFER_GOAL}", setting.device)]


def _trained(base: Any, adapters: dict[str, Any], peft: Any, setting: Setting, repeats: int) -> dict[str, float]:
    single, first = copy.deepcopy(base), dict([next(iter(adapters.items()))])
    with bank_of(base, adapters) as bank, bank_of(single, first) as alone:
        bank.use(Gates.rows(list(adapters)))
        alone.use(Gates.rows(list(first) * setting.tasks))
        steps: dict[str, Step] = {
            "floor": step_of(_bare(base), setting),
            "ours": step_of(bank.model.model, setting, bank.zero_grad),
            "single": step_of(alone.model.model, setting, alone.zero_grad),
            "sequential": _sequential(peft, list(adapters), setting),
            "mixed": _mixed(peft, list(adapters), setting),
        }
        return least_of(steps, _rounds(setting, repeats), setting.device)


def _rows(setting: Setting, seconds: dict[str, float], goal: float, case: str) -> list[dict[str, object]]:
    """Against one task after another, against one adapter for all rows (its floor), and against the peer's mixed batch."""
    sequential, mixed = seconds | {"peer": seconds["sequential"]}, seconds | {"peer": seconds["mixed"]}
    single = seconds | {"peer": seconds["single"], "floor": seconds["single"]}
    share, device = f"overhead <= {SHARE_GOAL}", setting.device
    return [
        row("A1" if goal else "A1b", f"mt_train_mixed {case}", sequential, f"ratio >= {goal}" if goal else share, device),
        row("A1s", f"mt_train_mixed over one adapter {case}", single, f"overhead <= {SINGLE_GOAL}", device),
        row("A2", f"mt_train_vs_adapter_names {case}", mixed, "ratio >= 7.0" if setting.tasks == 128 else share, device),
    ]


def _inferred(base: Any, adapters: dict[str, Any], peft: Any, setting: Setting, repeats: int) -> dict[str, float]:
    with bank_of(base, adapters) as bank:
        bank.use(Gates.rows(list(adapters)))
        steps = {
            "floor": step_of(_bare(base), setting),
            "ours": step_of(bank.model.model, setting),
            "mixed": _mixed(peft, list(adapters), setting),
        }
        return least_of(steps, _rounds(setting, repeats), setting.device)


def _bare(base: Any) -> Any:
    """The trunk alone, with the same weights."""
    from transformers import LlamaModel

    bare: Any = LlamaModel(base.config).to(base.device, base.trunk.embed_tokens.weight.dtype)
    own = {name: value for name, value in base.trunk.state_dict().items() if name in bare.state_dict()}
    bare.load_state_dict(own)
    return bare.requires_grad_(False).eval()


def _sequential(peft: Any, names: list[str], setting: Setting) -> Step:
    """One task after another, each its own row."""
    rows = setting.inputs()

    def step() -> Any:
        for parameter in peft.parameters():
            parameter.grad = None
        for place, name in enumerate(names):
            peft.base_model.set_adapter(name)
            part = rows[place : place + 1].clone().requires_grad_(setting.backward)
            with autocast(setting.device), torch.set_grad_enabled(setting.backward):
                out = peft.base_model.model.model(inputs_embeds=part).last_hidden_state
            if setting.backward:
                out.float().square().mean().backward()

    return step


def _mixed(peft: Any, names: list[str], setting: Setting) -> Step:
    """peft's own mixed batch, in eval mode, where it does not refuse gradients."""
    rows = setting.inputs()
    own = [parameter for name, parameter in peft.named_parameters() if "lora_" in name]

    def step() -> Any:
        peft.eval()
        for parameter in own:
            parameter.grad = None
            parameter.requires_grad_(True)
        part = rows.clone().requires_grad_(setting.backward)
        with autocast(setting.device), torch.set_grad_enabled(setting.backward):
            out = peft(inputs_embeds=part, adapter_names=names, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        if setting.backward:
            out.float().square().mean().backward()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=32, help="leave larger batches out: peft takes a minute to attach 128 adapters")
    arguments = parser.parse_args()
    for found in run(arguments.repeats, "cuda" if arguments.cuda else "cpu", arguments.tasks):
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()})
