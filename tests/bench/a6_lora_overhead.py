"""A6: what one LoRA adapter adds to a training step, ours and stock peft's, over the frozen base's forward and input gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from torch import nn

HIDDEN, LAYERS, BATCH, TOKENS, RANK = 512, 4, 4, 128, 8
GOAL = 1.10

Step = Callable[[], None]


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of least CPU seconds per step over three times ``repeats`` interleaved rounds, one thread, float32.

    ``ratio`` is peft's seconds over ours; ``overhead`` and ``peer_overhead`` are over the base's, which is the floor.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _least(_steps(), 3 * repeats)
    finally:
        torch.set_num_threads(threads)
    return [_row(p, seconds) for p in (0.0, 0.05)]


def _row(p: float, seconds: dict[str, float]) -> dict[str, object]:
    ours, peer, floor = seconds[f"ours {p}"], seconds[f"peft {p}"], seconds["base"]
    return {
        "row": "A6",
        "case": f"lora_single_overhead dropout={p} hidden={HIDDEN} layers={LAYERS} B={BATCH} S={TOKENS} r={RANK}",
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "floor": floor,
        "floor_share": floor / ours,
        "overhead": ours / floor,
        "peer_overhead": peer / floor,
        "goal": f"overhead <= {GOAL:.2f}",
        "held": ours / floor <= GOAL,
        "unit": "CPU s/step",
    }


def _steps() -> dict[str, Step]:
    base = _base()
    steps: dict[str, Step] = {"base": _step(copy.deepcopy(base))}
    for p in (0.0, 0.05):
        steps[f"ours {p}"] = _step(_ours(copy.deepcopy(base), p))
        steps[f"peft {p}"] = _step(_peft(copy.deepcopy(base), p))
    return steps


def _base() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=1024,
        intermediate_size=HIDDEN * 11 // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model: nn.Module = LlamaModel(shape).requires_grad_(False)
    return model.train()


def _ours(model: nn.Module, p: float) -> nn.Module:
    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods import Lora

    return _nonzero(Lora(r=RANK, alpha=2 * RANK, dropout=p, targets=("all",)).attach(model, HeadSpec("lm")))


def _peft(model: Any, p: float) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return _nonzero(inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=p, target_modules=targets), model))


def _nonzero(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def _step(model: nn.Module) -> Step:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(BATCH, TOKENS, HIDDEN, generator=generator).requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for tensor in (embeddings, *trained):
            tensor.grad = None
        model(inputs_embeds=embeddings).last_hidden_state.square().mean().backward()

    return step


def _least(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """CPU seconds of each step's best round: single steps, since a neighbour's load comes and goes within seconds."""
    for step in steps.values():
        step()
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = process_time()
            step()
            best[name] = min(best[name], process_time() - start)
    return best


if __name__ == "__main__":
    for row in run():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
