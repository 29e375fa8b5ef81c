"""E1: a DP-SGD step (exact clipping per example, noise, optimizer) beside the same step without privacy, and beside Opacus.

Llama of hidden 512 or 256, 4 layers, LoRA rank 8 on all seven linears, float32, one thread, one batch of equal lengths again and
again. ``floor`` is our own step without privacy; ``overhead`` is ours over it. The peer is Opacus' per-sample hooks on stock peft, with
its noise from torch's generator; ours is exact and from a keystream without a seed. Where Opacus is not installed its column is empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.bench._common import least
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, Fingerprint
from fedpeft.bases.base import Base
from fedpeft.methods import Lora
from fedpeft.tasks import Encoded, Generation
from fedpeft.tasks.likelihood import packed
from fedpeft.training import TrainJob, TrainSettings
from fedpeft.training.dp import DpEngine
from fedpeft.training.engine import LocalEngine
from fedpeft.training.packed import by_sequence

LAYERS, VOCABULARY, RANK, RATE, NOISE, CLIP, GOAL = 4, 1024, 8, 1e-4, 1.0, 1.0, 1.05
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """One case."""

    hidden: int
    examples: int
    tokens: int


SHAPES = (Shape(512, 8, 64), Shape(512, 4, 256), Shape(256, 24, 48))


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of least CPU seconds per step over three times ``repeats`` interleaved rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(shape, repeats) for shape in SHAPES]
    finally:
        torch.set_num_threads(threads)


def _row(shape: Shape, repeats: int) -> dict[str, object]:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (shape.examples, shape.tokens)).astype(np.int32)
    steps = {"private": _ours(shape, ids, True), "plain": _ours(shape, ids, False)}
    peer = _opacus(shape, ids)
    for step in steps.values():
        step()
    if peer is not None:
        peer()
    seconds = least(steps | ({"opacus": peer} if peer else {}), 3 * repeats)
    ours, floor, other = seconds["private"], seconds["plain"], seconds.get("opacus")
    return {
        "row": "E1",
        "case": f"dp_sgd_step lora all hidden={shape.hidden} N={shape.examples} S={shape.tokens}"
        + ("" if other else " (no opacus: skipped)"),
        "ours": ours,
        "peer": other,
        "ratio": other / ours if other else None,
        "floor": floor,
        "floor_share": floor / ours,
        "overhead": ours / floor,
        "goal": f"overhead <= {GOAL:.2f}",
        "held": ours / floor <= GOAL,
        "unit": "CPU s/step",
    }


def _model(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=shape.hidden * 11 // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def _ours(shape: Shape, ids: Any, private: bool) -> Callable[[], None]:
    model = _model(shape)
    places = np.arange(shape.examples)
    data = Encoded(tuple(ids), places, np.ones(shape.examples, np.int64), places, 0)
    base = Base(BaseSpec("random"), Fingerprint("w", "t", "", "none"), "causal", None, model.config, "cpu", model, model.model)
    task = Generation("bench")
    spec = make_spec("bench", base, Lora(r=RANK, alpha=2 * RANK, targets=("all",)), task.head)
    live = attach(base, spec)
    live.load(initial(base, spec, 0).tensors)
    settings = TrainSettings(batch_size=shape.examples, lr=RATE, steps=1 << 30)
    engine = DpEngine(NOISE, CLIP) if private else LocalEngine()
    begun = engine.begin(live, task, settings, TrainJob(spec.layout.roles, 0))
    batch = packed(data, places.tolist(), shape.examples)

    def step() -> None:
        with by_sequence(model):
            begun.step(0, [batch])

    return step


def _opacus(shape: Shape, ids: Any) -> Callable[[], None] | None:
    try:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        return None
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")
    adapted = get_peft_model(_model(shape), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS)).train()
    model = GradSampleModule(adapted, strict=False)
    inner = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], RATE)
    optimizer = DPOptimizer(inner, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=shape.examples)
    tokens = torch.from_numpy(ids).long()

    def step() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1), reduction="none")
        losses.view(shape.examples, -1).mean(1).mean().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    for row in run():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
