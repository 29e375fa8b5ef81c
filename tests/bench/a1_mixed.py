"""A1, A1b, A2, A3: one batch of many tasks, ours beside peft's two ways, over the base alone.

A1: training one row per task; the peer trains one task after another (``set_adapter``). A2: the peer's mixed batch (``adapter_names``),
which raises in training mode and is forced by eval mode. A3: forward only, against ``adapter_names``. The floor is the
frozen base alone, forward and input gradient. ``A1s`` rows compare with one adapter on all rows.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tests.bench._mixed import Bounds, Peft, Setting, Step, adapters_of, autocast, bank_of, base_of, case_of, least_of, row, shown, step_of

from fedpeft.mixtures import Gates

TRAIN = [(Setting(8, 32), 2.7), (Setting(32, 32), 2.9), (Setting(128, 32), 5.8)]
LONG = [(Setting(8, 128), 0.0), (Setting(32, 64, 16), 0.0)]
SHARE_GOAL, INFER_GOAL, SINGLE_GOAL = 1.11, 1.10, 1.25
Rows = Iterator[dict[str, object]]


def run(repeats: int = 5, most: int = 128) -> list[dict[str, object]]:
    """The rows up to ``most`` tasks."""
    return list(rows(repeats, most))


def rows(repeats: int, most: int) -> Rows:
    """Row by row; peers of 128 tasks run once, as one step takes them half a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = base_of()
        for setting, goal in (*TRAIN, *LONG):
            if setting.tasks <= most:
                yield from measured(base, Peft(base), setting, goal, rounds=_rounds(setting, repeats))
    finally:
        torch.set_num_threads(threads)


def _rounds(setting: Setting, repeats: int) -> dict[str, int]:
    """More rounds where a step is short, fewer for peers whose step grows with the square of the tasks."""
    own = max(3, 3 * repeats if setting.tasks * setting.tokens <= 1024 else repeats)
    peer = repeats if setting.tasks <= 8 else max(1, repeats // 2) if setting.tasks <= 32 else 1
    return {"floor": own, "ours": own, "single": own, "sequential": peer, "mixed": peer}


def measured(base: Any, peer: Peft, setting: Setting, goal: float, *, rounds: dict[str, int], bounds: Bounds | None = None) -> Rows:
    """Rows of training, then of inference; ours alone where the peer's adapters cannot be attached in time."""
    bounds = bounds or Bounds()
    adapters, case = adapters_of(base, setting.tasks, setting.rank), case_of(base, setting)
    fault = peer.hold(adapters, bounds.attach)
    peft, note = (None, {"note": fault}) if fault else (peer.model, {})
    found = _trained(base, adapters, peft, setting, (rounds, bounds))
    for one in _rows(setting, found, goal, (case, base.device)):
        yield one | note
    if goal:
        found = _inferred(base, adapters, peft, replace(setting, backward=False), (rounds, bounds))
        yield row("A3", f"mt_infer_mixed {case}", _beside(found, "mixed"), f"overhead <= {INFER_GOAL}", base.device) | note


def _trained(base: Any, adapters: dict[str, Any], peft: Any, setting: Setting, limits: tuple[dict[str, int], Bounds]) -> dict[str, float]:
    single, first = copy.deepcopy(base), dict([next(iter(adapters.items()))])
    floor = copy.deepcopy(base.trunk)
    with bank_of(base, adapters) as bank, bank_of(single, first) as alone:
        bank.use(Gates.rows(list(adapters)))
        alone.use(Gates.rows(list(first) * setting.tasks))
        steps: dict[str, Step] = {
            "floor": step_of(base, floor, setting),
            "ours": step_of(base, bank.model.model, setting, bank.zero_grad),
            "single": step_of(base, alone.model.model, setting, alone.zero_grad),
        }
        if peft is not None:
            steps["sequential"] = _sequential(base, peft, list(adapters), setting)
            steps["mixed"] = _mixed(base, peft, list(adapters), setting)
        return least_of(steps, limits[0], base.device, limits[1].rounds)


def _rows(setting: Setting, seconds: dict[str, float], goal: float, where: tuple[str, str]) -> Rows:
    """Against one task after another, against one adapter for all rows (its floor), and against the peer's mixed batch."""
    (case, device), share = where, f"overhead <= {SHARE_GOAL}"
    single = seconds | {"peer": seconds["single"], "floor": seconds["single"]}
    wanted = f"ratio >= {goal}" if goal else share
    yield row("A1" if goal else "A1b", f"mt_train_mixed {case}", _beside(seconds, "sequential"), wanted, device)
    yield row("A1s", f"mt_train_mixed over one adapter {case}", single, f"overhead <= {SINGLE_GOAL}", device)
    if "mixed" in seconds:
        wanted = "ratio >= 7.0" if setting.tasks == 128 else share
        yield row("A2", f"mt_train_vs_adapter_names {case}", _beside(seconds, "mixed"), wanted, device)


def _beside(seconds: dict[str, float], peer: str) -> dict[str, float]:
    return seconds | {"peer": seconds[peer]} if peer in seconds else seconds


def _inferred(base: Any, adapters: dict[str, Any], peft: Any, setting: Setting, limits: tuple[dict[str, int], Bounds]) -> dict[str, float]:
    floor = copy.deepcopy(base.trunk)
    with bank_of(base, adapters) as bank:
        bank.use(Gates.rows(list(adapters)))
        steps = {"floor": step_of(base, floor, setting), "ours": step_of(base, bank.model.model, setting)}
        if peft is not None:
            steps["mixed"] = _mixed(base, peft, list(adapters), setting)
        return least_of(steps, limits[0], base.device, limits[1].rounds)


def _sequential(base: Any, peft: Any, names: list[str], setting: Setting) -> Step:
    """One task after another, each its own row."""
    inputs = setting.inputs(base)

    def step() -> Any:
        for parameter in peft.parameters():
            parameter.grad = None
        for place, name in enumerate(names):
            peft.base_model.set_adapter(name)
            part = inputs[place : place + 1].clone().requires_grad_(setting.backward)
            with autocast(base), torch.set_grad_enabled(setting.backward):
                out = peft.base_model.model.model(inputs_embeds=part).last_hidden_state
            if setting.backward:
                out.float().square().mean().backward()

    return step


def _mixed(base: Any, peft: Any, names: list[str], setting: Setting) -> Step:
    """peft's own mixed batch, in eval mode, where it does not refuse gradients."""
    inputs = setting.inputs(base)
    own = [parameter for name, parameter in peft.named_parameters() if "lora_" in name]

    def step() -> Any:
        peft.eval()
        for parameter in own:
            parameter.grad = None
            parameter.requires_grad_(True)
        part = inputs.clone().requires_grad_(setting.backward)
        with autocast(base), torch.set_grad_enabled(setting.backward):
            out = peft(inputs_embeds=part, adapter_names=names, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        if setting.backward:
            out.float().square().mean().backward()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=32, help="leave larger batches out: peft takes a minute to attach 128 adapters")
    arguments = parser.parse_args()
    shown(rows(arguments.repeats, arguments.tasks))
