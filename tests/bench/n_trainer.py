"""N: real tokens per CPU second of a central job's loop on one rank, against HF ``Trainer`` under the same DeepSpeed JSON.

Model, adapter and examples of `f1_edge_step`. Both clocks run from the end of the first step to the end of the last, so that neither's
set-up counts. N1: Trainer with the same JSON (ZeRO-2). F1c: Trainer without DeepSpeed, the peer of row F1. N2: our loop with padding.
N3: four tasks, a micro-batch of each one after the other, against one mixed micro-batch: the same examples, the same step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import process_time
from typing import Any, cast

import numpy as np
import torch
from tests.bench import f1_edge_step as f1
from tests.bench.f1_edge_step import BATCH, GOALS, LINEARS, RANK, RATE, Examples, Timed, least_seconds

from fedpeft.adapters import initial, make_spec
from fedpeft.bases import BaseSpec, Fingerprint
from fedpeft.bases.base import Base
from fedpeft.central.balancing import Balancing, Plan
from fedpeft.central.engine import ZeroEngine
from fedpeft.central.joint import Joint, JointTask, Mixed
from fedpeft.central.pool import Pool
from fedpeft.central.world import World, joined
from fedpeft.central.zero import zero_json
from fedpeft.methods import Lora
from fedpeft.processes import free_port
from fedpeft.tasks import Generation
from fedpeft.training import TrainJob, TrainSettings, train
from fedpeft.training.config import DeepSpeed

STEPS, TASKS = 5, 4
SETTINGS = TrainSettings(steps=STEPS, batch_size=BATCH, lr=RATE)


def run(repeats: int = 3) -> list[dict[str, object]]:
    """Rows of real tokens per CPU second at the least CPU time of ``repeats`` interleaved rounds; ``ratio`` is ours over the peer's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with joined(world := World(port=free_port()), 600):
            examples = f1.make_examples(STEPS)
            rows = [row for dropout in GOALS for row in _trainers(world, examples, dropout, repeats)]
            return [*rows, _padding(world, examples, repeats), _homogeneous(world, examples, repeats)]
    finally:
        torch.set_num_threads(threads)


def _trainers(world: World, examples: Examples, dropout: float, repeats: int) -> list[dict[str, object]]:
    contenders = {
        "ours": Ours(world, examples, dropout=dropout),
        "json": _trainer(examples, dropout, _table()),
        "plain": _trainer(examples, dropout, None),
        "floor": f1.floor_of(examples[BATCH:]),
    }
    case = f"central_step dropout={dropout}"
    found = least_seconds(cast(Any, contenders), repeats)
    return [
        _row("N1", f"{case}, Trainer with the same JSON", found, examples, "json", "ratio >= 1.0"),
        _row("F1c", f"{case}, Trainer without DeepSpeed", found, examples, "plain", f"ratio >= {GOALS[dropout]:.1f}"),
    ]


def _padding(world: World, examples: Examples, repeats: int) -> dict[str, object]:
    contenders = {"ours": Ours(world, examples), "padded": Ours(world, examples, replace(SETTINGS, packing=False))}
    return _row("N2", "central_step packed, against padded", least_seconds(cast(Any, contenders), repeats), examples, "padded")


def _homogeneous(world: World, examples: Examples, repeats: int) -> dict[str, object]:
    each = replace(SETTINGS, batch_size=BATCH // TASKS, accumulate=TASKS)
    contenders = {"ours": Ours(world, examples, tasks=TASKS), "apart": Ours(world, examples, each, tasks=TASKS)}
    case = f"central_step {TASKS} tasks mixed, against a micro-batch of each"
    return _row("N3", case, least_seconds(cast(Any, contenders), repeats), examples, "apart")


def _row(
    row: str, case: str, found: tuple[dict[str, float], dict[str, float]], examples: Examples, peer: str, goal: str = ""
) -> dict[str, object]:
    seconds, losses = found
    tokens = sum(len(ids) for ids, _ in examples[BATCH:])
    more = {"floor_share": seconds["floor"] / seconds["ours"], "limit": seconds[peer] / seconds["floor"]} if "floor" in seconds else {}
    return {
        "row": row,
        "case": case,
        "ours": tokens / seconds["ours"],
        "peer": tokens / seconds[peer],
        "ratio": seconds[peer] / seconds["ours"],
        "goal": goal,
        "unit": "real tokens/CPU s",
        "first_loss_difference": abs(losses["ours"] - losses[peer]),
        **more,
    }


@dataclass(frozen=True)
class InOrder:
    """A pool's tasks, examples in their order: a step holds equally many of each task, one task's after the other's."""

    pool: Pool
    name: str = "bench"

    def batches(self, data: object, size: int, seed: int, epoch: int) -> Iterator[Mixed]:
        """Micro-batches of ``size``, all of one task where a step has several."""
        count, tasks = int(self.pool.firsts[-1]), len(self.pool.names)
        for at in range(0, count, BATCH):
            picks = np.concatenate([first + np.arange(at // tasks, (at + BATCH) // tasks) for first in self.pool.firsts[:-1]])
            yield from (Mixed(self.pool, picks[start : start + size]) for start in range(0, BATCH, size))


class Ours:
    """A central job's loop: each call is a job of its own, on a model of its own."""

    def __init__(self, world: World, examples: Examples, settings: TrainSettings = SETTINGS, dropout: float = 0.0, tasks: int = 1) -> None:
        model = f1.make_model()
        self.base = Base(BaseSpec("random"), Fingerprint("w", "t", "", "none"), "causal", None, model.config, "cpu", model, model.model)
        self.world, self.settings = world, settings
        self.tasks = {f"t{number}": Generation(f"t{number}") for number in range(tasks)}
        self.pool = Pool.of(self.tasks, {name: f1.encode(examples[place::tasks]) for place, name in enumerate(self.tasks)})
        method = Lora(r=RANK, alpha=RANK, dropout=dropout, targets=("all",))
        specs = {name: make_spec(name, self.base, method, task.head) for name, task in self.tasks.items()}
        self.adapters = {name: initial(self.base, spec, 0) for name, spec in specs.items()}

    def __call__(self) -> tuple[float, float]:
        """CPU seconds of all steps after the first, and the mean loss of the first."""
        times: list[float] = []
        losses: list[float] = []

        def heard(_step: int, loss: float) -> None:
            times.append(process_time())
            losses.append(loss)

        with Joint.attach("bench", self.base, self.pool, self.adapters) as joint:
            engine = ZeroEngine(_table(self.settings), self.world, Balancing(Plan(), joint, self.world))
            job = TrainJob(joint.spec.layout.roles, 0, None, heard)
            task = cast(JointTask, InOrder(self.pool))
            train(cast(Any, joint), cast(Any, task), cast(Any, None), self.settings, job, cast(Any, engine))
        return times[-1] - times[0], losses[0]


def _table(settings: TrainSettings = SETTINGS) -> dict[str, Any]:
    return zero_json(DeepSpeed(stage=2), settings, 1)


def _trainer(examples: Examples, dropout: float, table: dict[str, Any] | None) -> Timed:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=LINEARS, task_type="CAUSAL_LM")
    rows, base = [f1.peer_row(ids, start) for ids, start in examples], f1.make_model()
    return lambda: f1.trainer_seconds(get_peft_model(copy.deepcopy(base), config), rows, f1.collate, BATCH, 1, copy.deepcopy(table))


if __name__ == "__main__":
    for row in run():
        print({key: round(value, 7) if isinstance(value, float) else value for key, value in row.items()})
