"""F1: real (not padding) tokens per CPU second of our loop and of HF ``Trainer`` with peft, same weights, same examples.

A padded instruction batch: log-normal lengths of mean 53, 8 examples, a third of the tokens carry loss; Llama of hidden 512,
4 layers, vocabulary 4096, LoRA rank 8 on all seven linears, float32, one thread. The Trainer's set-up is left out of its time
(its clock runs from its first step's begin to its last step's end), ours is in: `train` is timed whole. ``limit`` is the ratio that
the bare base would reach on the packed row, without adapter and optimizer: no loop gets beyond it. The goal of 3.0 with dropout was
set on a CPU whose dropout masks cost the peer 40 % of its step; where they cost 15 % (AVX-512), the limit itself is near 2.6.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.adapters.live import Live
from fedpeft.bases import BaseSpec, Fingerprint
from fedpeft.bases.base import Base
from fedpeft.methods import Lora
from fedpeft.tasks import Encoded, Generation
from fedpeft.training import TrainJob, TrainSettings, train
from fedpeft.training.packed import by_sequence

HIDDEN, LAYERS, VOCABULARY, RANK = 512, 4, 4096, 8
BATCH, STEPS, MEAN, SPREAD, LABELLED, RATE = 8, 6, 53.0, 0.55, 0.35, 1e-3
GOALS = {0.0: 2.0, 0.05: 3.0}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Examples = list[tuple[np.ndarray, int]]
Timed = Callable[[], tuple[float, float]]
"""Runs some steps; CPU seconds and the mean loss of the first step."""


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of real tokens per CPU second at the least CPU time of ``repeats`` interleaved rounds; ``ratio`` is ours over the peer's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(dropout, repeats) for dropout in GOALS]
    finally:
        torch.set_num_threads(threads)


def _row(dropout: float, repeats: int) -> dict[str, object]:
    examples = make_examples()
    tokens = sum(len(ids) for ids, _ in examples)
    padded = sum(BATCH * max(len(ids) for ids, _ in examples[at : at + BATCH]) for at in range(0, len(examples), BATCH))
    contenders: dict[str, Timed] = {"ours": _ours(examples, dropout), "peer": _peer(examples, dropout), "floor": floor_of(examples)}
    least, losses = least_seconds(contenders, repeats)
    ratio = least["peer"] / least["ours"]
    return {
        "row": "F1",
        "case": f"edge_step dropout={dropout} hidden={HIDDEN} layers={LAYERS} vocabulary={VOCABULARY} B={BATCH} r={RANK} "
        f"mean length={tokens / len(examples):.0f} padding efficiency={tokens / padded:.2f}",
        "ours": tokens / least["ours"],
        "peer": tokens / least["peer"],
        "ratio": ratio,
        "goal": f"ratio >= {GOALS[dropout]:.1f}",
        "held": ratio >= GOALS[dropout],
        "unit": "real tokens/CPU s",
        "floor_share": least["floor"] / least["ours"],
        "limit": least["peer"] / least["floor"],
        "first_loss_difference": abs(losses["ours"] - losses["peer"]),
    }


def least_seconds(contenders: dict[str, Timed], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Least CPU seconds over interleaved rounds after one to warm up, and the first losses."""
    losses = {name: contender()[1] for name, contender in contenders.items()}
    least = {name: float("inf") for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            least[name] = min(least[name], contender()[0])
    return least, losses


def make_examples(steps: int = STEPS) -> Examples:
    """Token ids and the position of the first labelled token of the examples of ``steps`` steps, the same for both sides."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(0.0, SPREAD, BATCH * steps)
    lengths = np.clip(drawn * MEAN / drawn.mean(), 6, 400).astype(int)
    return [(rng.integers(3, VOCABULARY, length).astype(np.int32), max(1, round(length * (1 - LABELLED)))) for length in lengths]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=HIDDEN * 11 // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return LlamaForCausalLM(shape).requires_grad_(False).eval()


@dataclass(frozen=True)
class InOrder:
    """A generation task whose batches come in the data's order, so that both sides see the same ones."""

    inner: Generation = field(default_factory=lambda: Generation("bench"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Any:
        """As `Generation.batches` without its shuffle."""
        from fedpeft.tasks.likelihood import packed

        return (packed(data, list(range(at, at + size)), size) for at in range(0, len(data), size))


def floor_of(examples: Examples) -> Timed:
    """The bare base on the same packed rows: forward, and the gradient of its input; no adapter, no optimizer."""
    model, data = make_model(), encode(examples)

    def timed() -> tuple[float, float]:
        began = process_time()
        hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        with by_sequence(model):
            for batch in InOrder().batches(data, BATCH, 0, 0):
                InOrder().loss(model, batch).total.backward()
        hook.remove()
        return process_time() - began, 0.0

    return timed


def encode(examples: Examples) -> Encoded:
    places = np.arange(len(examples))
    return Encoded(tuple(ids for ids, _ in examples), places, np.array([start for _, start in examples]), places, 0)


def _ours(examples: Examples, dropout: float) -> Timed:
    model, data = make_model(), encode(examples)
    base = Base(BaseSpec("random"), Fingerprint("w", "t", "", "none"), "causal", None, model.config, "cpu", model, model.model)
    spec = make_spec("bench", base, Lora(r=RANK, alpha=RANK, dropout=dropout, targets=("all",)), Generation("bench").head)
    start = initial(base, spec, 0).tensors
    live: Live = attach(base, spec)
    settings = TrainSettings(steps=STEPS, batch_size=BATCH, lr=RATE)

    def timed() -> tuple[float, float]:
        live.load(start)
        losses: list[float] = []
        job = TrainJob(spec.layout.roles, 0, None, lambda _step, loss: losses.append(loss))
        began = process_time()
        train(live, InOrder(), data, settings, job)  # type: ignore[arg-type]
        return process_time() - began, losses[0]

    return timed


class Clock(TrainerCallback):
    """CPU time from the begin of the first step that counts, after ``skip`` others, to the last step's end."""

    def __init__(self, skip: int = 0) -> None:
        self.skip, self.began, self.ended = skip, 0.0, 0.0

    def on_step_begin(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        """Start once."""
        if state.global_step == self.skip:
            self.began = process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The last one counts."""
        self.ended = process_time()


def _peer(examples: Examples, dropout: float) -> Timed:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=LINEARS, task_type="CAUSAL_LM")
    rows = [peer_row(ids, start) for ids, start in examples]
    base = make_model()
    return lambda: trainer_seconds(get_peft_model(copy.deepcopy(base), config), rows, collate, BATCH)


def trainer_seconds(
    model: Any, rows: list[Any], collate: Callable[[Any], Any], batch: int, skip: int = 0, deepspeed: dict[str, Any] | None = None
) -> tuple[float, float]:
    """CPU seconds of one pass of HF ``Trainer`` over ``rows`` in their order, but for ``skip`` steps, and the mean loss of its first."""
    clock = Clock(skip)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, _arguments(folder, batch, len(rows) // batch, deepspeed), collate, rows, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return clock.ended - clock.began, float(first)


def _arguments(folder: str, batch: int, steps: int, deepspeed: dict[str, Any] | None) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_first_step=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
        deepspeed=deepspeed,
    )


def peer_row(ids: np.ndarray, start: int) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(ids).long()
    labels = tokens.clone()
    labels[:start] = -100
    return {"input_ids": tokens, "labels": labels}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


if __name__ == "__main__":
    for row in run():
        print({key: round(value, 7) if isinstance(value, float) else value for key, value in row.items()})
