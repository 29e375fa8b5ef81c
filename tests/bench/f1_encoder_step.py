"""F1 on the demo's own work: classification of real texts on the pretrained MiniLM, our loop and HF ``Trainer`` with peft.

The same examples in the same padded batches, LoRA rank 8 on the attention and a head of 8 labels, float32, one thread. Two peers: with
our arithmetic (the frozen encoder's own dropout off), and as the library comes (dropout 0.1 on), which is what most people run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import process_time
from typing import Any

import numpy as np
import torch
from tests.bench.f1_edge_step import Timed, least_seconds, trainer_seconds
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.bases.base import Base
from fedpeft.methods import Lora
from fedpeft.tasks import Batch, Classification, Encoded, Source, read_rows
from fedpeft.tasks.stdlib import STDLIB_LABELS
from fedpeft.training import TrainJob, TrainSettings, train

BATCH, STEPS, RANK, RATE, GOAL = 16, 8, 8, 1e-3, 1.0
TASK = Classification("area", STDLIB_LABELS["area"])


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of real tokens per CPU second at the least CPU time of ``repeats`` interleaved rounds; ``ratio`` is ours over the peer's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(repeats)
    finally:
        torch.set_num_threads(threads)


def _rows(repeats: int) -> list[dict[str, object]]:
    base = load_base(BaseSpec("minilm", max_tokens=128), "cpu")
    rows = read_rows(Source(package="stdlib", where={"task": TASK.name}, limit=BATCH * STEPS * 2), "train")[: BATCH * STEPS]
    data = TASK.encode(rows, base)
    contenders: dict[str, Timed] = {
        "ours": _ours(base, data),
        "same arithmetic": _peer(base, data, False),
        "library defaults": _peer(base, data, True),
    }
    least, losses = least_seconds(contenders, repeats)
    tokens = sum(len(ids) for ids in data.ids)
    return [_row(peer, tokens, least, losses) for peer in ("same arithmetic", "library defaults")]


def _row(peer: str, tokens: int, least: dict[str, float], losses: dict[str, float]) -> dict[str, object]:
    ratio = least[peer] / least["ours"]
    return {
        "row": "F1",
        "case": f"encoder_step minilm, {peer} B={BATCH} r={RANK} mean length={tokens / (BATCH * STEPS):.0f}",
        "ours": tokens / least["ours"],
        "peer": tokens / least[peer],
        "ratio": ratio,
        "goal": f"ratio >= {GOAL:.1f}",
        "held": ratio >= GOAL,
        "unit": "real tokens/CPU s",
        "first_loss_difference": abs(losses["ours"] - losses[peer]),
    }


@dataclass(frozen=True)
class InOrder:
    """The task with batches in the data's order, so that both sides see the same ones."""

    inner: Classification = TASK

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """``size`` neighbours a batch."""
        for at in range(0, len(data), size):
            part = slice(at, at + size)
            own = replace(data, ids=data.ids[part], labels=data.labels[part], starts=data.starts[part], owners=np.arange(size))
            yield from self.inner.batches(own, size, seed, epoch)


def _ours(base: Base, data: Encoded) -> Timed:
    spec = make_spec(TASK.name, base, Lora(r=RANK, alpha=RANK), TASK.head)
    start = initial(base, spec, 0).tensors
    settings = TrainSettings(steps=STEPS, batch_size=BATCH, lr=RATE)

    def timed() -> tuple[float, float]:
        losses: list[float] = []
        job = TrainJob(spec.layout.roles, 0, None, lambda _step, loss: losses.append(loss))
        began = process_time()
        with attach(base, spec) as live:
            live.load(start)
            train(live, InOrder(), data, settings, job)  # type: ignore[arg-type]
        return process_time() - began, losses[0]

    return timed


def _peer(base: Base, data: Encoded, dropout: bool) -> Timed:
    from peft import LoraConfig, get_peft_model

    spec = make_spec(TASK.name, base, Lora(r=RANK, alpha=RANK), TASK.head)
    shell = copy.deepcopy(base.shell(TASK.head))
    for name, values in initial(base, spec, 0).tensors.named().items():
        if ".classifier." in name:
            shell.get_parameter(name.removeprefix("base_model.model.")).data.copy_(torch.from_numpy(values))
    for module in shell.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    targets = [entry.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for entry in spec.layout.subset({"A"}).entries]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="SEQ_CLS")
    rows = [
        {"input_ids": torch.from_numpy(ids).long(), "labels": torch.tensor(label)} for ids, label in zip(data.ids, data.labels, strict=True)
    ]
    return lambda: trainer_seconds(get_peft_model(copy.deepcopy(shell), config), rows, _collate(data.pad), BATCH)


def _collate(pad: int) -> Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([row["labels"] for row in rows])}

    return collate


if __name__ == "__main__":
    for row in run():
        print({key: round(value, 7) if isinstance(value, float) else value for key, value in row.items()})
