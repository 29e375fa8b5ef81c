"""K: peak memory and tokens per second of QLoRA (nf4, rank 16 on all linears) at sequence 2048, beside plain ``peft`` and HF ``Trainer``.

    python -m tests.bench.k_memory [--shapes 7B 8B] [--json FILE]

Random weights of the 7B shape (vocabulary 32 000) and the 8B shape (128 256), every token labelled. Rows K1 are the peak of allocated
memory at batch 1 with all levers, and with each one off; rows K2 are tokens per second as a share of the bound: 4 FLOP per weight and
token (6 with checkpointing), attention and output layer added, over the rate of an 8192-cubed bf16 product measured in the same run.
Without CUDA a tiny shape runs in its place, so that the code is tested; its figures say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tests.bench._bound import flop_per_token, matmul_rate, wait
from tests.bench._random import random_base
from tests.bench.f1_edge_step import LINEARS, InOrder

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases.base import Base
from fedpeft.methods import Lora, fused
from fedpeft.tasks import Encoded
from fedpeft.training import TrainJob, TrainSettings, train

RANK, WARM, STEPS = 16, 2, 5
SEQUENCE = {"7B": 2048, "8B": 2048, "tiny": 32}
TARGET = {"7B": 5.5, "8B": 7.0}
FLOOR = {"7B": 4.3, "8B": 6.3}
"""Computed least GiB: packed weights, bf16 embeddings and output layer, adapters, one layer at work."""
SHARE = 0.65
LEAN = TrainSettings(
    steps=WARM + STEPS,
    batch_size=1,
    lr=1e-4,
    precision="bf16",
    checkpoint_activations=True,
    offload_activations=True,
    optimizer="adamw8bit",
)
OFF: dict[str, dict[str, Any]] = {
    "all levers": {},
    "logits kept": {"chunked_loss": False},
    "states on the device": {"offload_activations": False},
    "no checkpointing": {"checkpoint_activations": False, "offload_activations": False},
    "moments of 4 bytes": {"optimizer": "adamw"},
    "no Liger": {"fused_kernels": False},
}
FAST: dict[str, dict[str, Any]] = {
    "4 rows": {"batch_size": 4, "offload_activations": False},
    "4 rows, no checkpointing": {"batch_size": 4, "offload_activations": False, "checkpoint_activations": False},
}
PENDING = "the peer is not measured yet"


@dataclass(frozen=True)
class Figures:
    """Peak of allocated memory in GiB (0 without CUDA), tokens per second, and the first loss."""

    peak: float
    speed: float
    loss: float


def run(repeats: int = 1, shapes: tuple[str, ...] = ("7B", "8B"), file: Path | None = None) -> list[dict[str, object]]:
    """All rows; ``repeats`` is there for the common form, every case runs once. ``file`` has what is known after each of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matmul_rate(device)
    rows: dict[tuple[object, object], dict[str, object]] = {}
    for shape in shapes if device == "cuda" else ("tiny",):
        for row in _rows(shape, device, rate):
            rows[row["row"], row["case"]] = row
            print(line(row), flush=True)
            if file:
                file.write_text(json.dumps(list(rows.values()), indent=2), encoding="utf-8")
        _settle(device)
    return list(rows.values())


def _rows(shape: str, device: str, rate: float) -> Iterator[dict[str, object]]:
    """Ours as soon as it is measured, what is wanted most first; then every row once more, beside the peer."""
    base, tokens = random_base(shape, device), SEQUENCE[shape]
    found: dict[str, Figures | str] = {}
    for name, more in {"all levers": {}, **FAST, **OFF}.items():
        if name not in found:
            found[name] = _tried(lambda more=more: ours(base, replace(LEAN, **more), tokens))
            yield from _shown(shape, name, found[name], PENDING, rate)
    with _one_by_one():
        found["layers one by one"] = _tried(lambda: ours(base, LEAN, tokens))
    _upcast(base)
    found["embeddings in float32"] = _tried(lambda: ours(base, LEAN, tokens))
    theirs = {rows: _tried(lambda rows=rows: peer(base, rows, tokens)) for rows in (4, 1)}
    for name, figures in found.items():
        yield from _shown(shape, name, figures, theirs[4 if name in FAST else 1], rate)


def _shown(shape: str, name: str, found: Figures | str, theirs: Figures | str, rate: float) -> Iterator[dict[str, object]]:
    """The rows of one case: of memory, of speed, and of both with all levers."""
    if name not in FAST:
        yield _memory_row(shape, name, found, theirs)
    if name in {"all levers", *FAST}:
        yield _speed_row(shape, "1 row" if name == "all levers" else name, found, theirs, rate)


def _memory_row(shape: str, name: str, found: Figures | str, theirs: Figures | str) -> dict[str, object]:
    row: dict[str, object] = {"row": "K1", "case": f"{shape} 1x{SEQUENCE[shape]} {name}", "unit": "GiB"}
    if isinstance(found, str):
        return row | {"fault": found}
    row |= {"ours": found.peak, "tokens_per_second": found.speed, "first_loss": found.loss}
    if not isinstance(theirs, str) and found.peak:
        row |= {"peer": theirs.peak, "ratio": theirs.peak / found.peak, "peer_first_loss": theirs.loss}
    if name == "all levers" and shape in TARGET:
        target = TARGET[shape]
        row |= {"goal": f"<= {target} GiB", "held": found.peak <= target, "floor_share": FLOOR[shape] / max(found.peak, 1e-9)}
    return row


def _speed_row(shape: str, name: str, found: Figures | str, theirs: Figures | str, rate: float) -> dict[str, object]:
    row: dict[str, object] = {"row": "K2", "case": f"{shape} {name} x{SEQUENCE[shape]}", "unit": "tokens/s"}
    if isinstance(found, str):
        return row | {"fault": found}
    share = found.speed * flop_per_token(shape, "no checkpointing" not in name, SEQUENCE[shape]) / rate
    row |= {
        "ours": found.speed,
        "peak": found.peak,
        "floor_share": share,
        "goal": f"share >= {SHARE}",
        "held": share >= SHARE,
        "rate": rate,
    }
    if isinstance(theirs, str):
        return row | {"peer_fault": theirs}
    return row | {"peer": theirs.speed, "ratio": found.speed / theirs.speed, "first_losses": (found.loss, theirs.loss)}


def ours(base: Base, settings: TrainSettings, tokens: int) -> Figures:
    """Some steps of `train`."""
    task = InOrder()
    spec = make_spec("bench", base, Lora(r=RANK, alpha=RANK, targets=("all",)), task.inner.head)
    start = initial(base, spec, 0).tensors
    _settle(base.device)
    with attach(base, spec) as live:
        live.load(start)
        ends: list[float] = []
        losses: list[float] = []

        def progress(_step: int, loss: float) -> None:
            wait(base.device)
            ends.append(time.perf_counter())
            losses.append(loss)

        job = TrainJob(spec.layout.roles, 0, None, progress)
        train(live, task, _data(base, settings, tokens), settings, job)  # type: ignore[arg-type]
    return _figures(base.device, ends, settings.batch_size * tokens, losses[0])


def peer(base: Base, rows: int, tokens: int) -> Figures:
    """The same with ``prepare_model_for_kbit_training``, ``get_peft_model`` and ``Trainer``; the base stays as these leave it."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import PrinterCallback, Trainer, TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(base.device)
            ends.append(time.perf_counter())

    _settle(base.device)
    model = prepare_model_for_kbit_training(base.model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, task_type="CAUSAL_LM"))
    data = [
        {"input_ids": torch.from_numpy(ids).long(), "labels": torch.from_numpy(ids).long()} for ids in _data(base, LEAN, tokens, rows).ids
    ]
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, _arguments(folder, rows, base.device), _collate, data, callbacks=[Clock()])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
            return _figures(base.device, ends, rows * tokens, float(loss))
    finally:
        model.unload()
        base.model.requires_grad_(False)
        for switch in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            if hasattr(base.model, switch):
                getattr(base.model, switch)()
                break


def _arguments(folder: str, rows: int, device: str) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        max_steps=WARM + STEPS,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_first_step=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _data(base: Base, settings: TrainSettings, tokens: int, rows: int | None = None) -> Encoded:
    """As many random sequences as the steps take, every token but the first labelled."""
    count = (rows or settings.batch_size) * settings.steps
    draw = np.random.default_rng(0)
    ids = tuple(draw.integers(3, base.config.vocab_size, tokens).astype(np.int32) for _ in range(count))
    places = np.arange(count)
    return Encoded(ids, places, np.ones(count, np.int64), places, 0)


def _figures(device: str, ends: list[float], tokens: int, loss: float) -> Figures:
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    steps = [after - before for before, after in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]
    return Figures(peak, tokens / median(steps), loss)


def _tried(work: Callable[[], Figures]) -> Figures | str:
    """The figures, or the one line of what went wrong: a lever that fails must not hide the others."""
    try:
        return work()
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError) as fault:
        return f"{type(fault).__name__}: {str(fault).splitlines()[0][:200] if str(fault) else ''}"


@contextmanager
def _one_by_one() -> Iterator[None]:
    """4-bit layers called by themselves, and LoRA's product added, as without our fused function."""
    own = fused.Forward.joins
    fused.Forward.joins = lambda *_: False  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        fused.Forward.joins = own  # type: ignore[method-assign]


def _upcast(base: Base) -> None:
    """What ``prepare_model_for_kbit_training`` does to embeddings and output layer."""
    model: Any = base.model
    model.get_input_embeddings().float()
    model.get_output_embeddings().float()


def _settle(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def line(row: dict[str, object]) -> str:
    """One row as text."""
    return "  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["7B", "8B"], choices=["7B", "8B"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run(1, tuple(arguments.shapes), arguments.json)


if __name__ == "__main__":
    main()
