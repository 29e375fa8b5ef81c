"""What the mixture benchmarks share: one random Llama, many adapters on it, ours and peft's, and steps to time on a CPU or a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """``tasks`` rows of ``tokens`` tokens, one per task; LoRA of ``rank`` on all linear layers; forward, or backward too."""

    tasks: int
    tokens: int
    rank: int = 8
    backward: bool = True
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"T={self.tasks} S={self.tokens} r={self.rank}" + ("" if self.device == "cpu" else f" {self.device}")

    def inputs(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        found = torch.randn(self.tasks, self.tokens, SIZES[self.device][0], generator=generator)
        return found.to(self.device, dtype_of(self.device))


SIZES = {"cpu": (512, 4), "cuda": (2048, 4)}
"""Hidden width and layers."""


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def autocast(device: str) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def base_of(device: str = "cpu", layers: int | None = None) -> Any:
    """A frozen Llama with random weights, as a `Base` that was never on a disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpeft.bases import Base, BaseSpec, Fingerprint

    torch.manual_seed(0)
    hidden, depth = SIZES[device]
    shape = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers or depth,
        vocab_size=1024,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(shape).to(device, dtype_of(device)).requires_grad_(False).eval()
    print_ = Fingerprint("weights", "tokenizer", "template", "none")
    return Base(BaseSpec("random"), print_, "causal", None, shape, device, model, model.model)


def adapters_of(base: Any, count: int, rank: int) -> dict[str, Any]:
    """``count`` LoRA adapters with random values."""
    import numpy as np

    from fedpeft.adapters import Adapter, make_spec
    from fedpeft.bases import HeadSpec
    from fedpeft.methods import Lora
    from fedpeft.tensors import Tensors

    spec = make_spec("task", base, Lora(r=rank, alpha=rank, targets=("all",)), HeadSpec("lm"))
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(spec.layout.size, dtype=np.float32) * np.float32(0.01) for _ in range(min(count, 8))]
    return {f"task{i}": Adapter(spec, Tensors(spec.layout, values[i % len(values)])) for i in range(count)}


@contextmanager
def bank_of(base: Any, adapters: dict[str, Any]) -> Iterator[Any]:
    from fedpeft.bases import HeadSpec
    from fedpeft.mixtures import Bank

    with Bank.attach(base, HeadSpec("lm"), adapters) as bank:
        yield bank


def peft_of(base: Any, adapters: dict[str, Any], names: Sequence[str] | None = None) -> Any:
    """peft's model with the same adapters; its own attaching walks all modules and adapters for each one."""
    import warnings

    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(base.model)
    first = next(iter(adapters.values()))
    rank = first.spec.method.r
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config, adapter_name="task0")
        for name in list(adapters)[1:]:
            peft.add_adapter(name, config)
    own = {name: parameter for name, parameter in peft.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for task, adapter in adapters.items():
            for name, values in adapter.tensors.named().items():
                stem, _, leaf = name.rpartition(".")
                own[f"{stem}.{task}.{leaf}"].copy_(torch.from_numpy(values))
    for parameter in own.values():
        parameter.requires_grad_(True)
    return peft


def step_of(trunk: nn.Module, setting: Setting, clear: Callable[[], object] = lambda: None, **extra: Any) -> Step:
    """One pass of ``trunk`` over the batch: forward, or forward and backward to adapters and embeddings."""
    rows = setting.inputs().requires_grad_(setting.backward)

    def step() -> Any:
        clear()
        rows.grad = None
        with autocast(setting.device), torch.set_grad_enabled(setting.backward):
            out = trunk(inputs_embeds=rows, **extra).last_hidden_state
        if setting.backward:
            out.float().square().mean().backward()
        return out

    return step


def least_of(steps: dict[str, Step], repeats: dict[str, int], device: str = "cpu") -> dict[str, float]:
    """Seconds of each step's best round, rounds interleaved: CPU time, or on a GPU the time until it is idle again."""
    best = dict.fromkeys(steps, float("inf"))
    for name, step in steps.items():
        for _ in range(2 if device == "cuda" else int(repeats[name] > 1)):
            step()
    for number in range(max(repeats.values())):
        for name, step in steps.items():
            if number < repeats[name]:
                best[name] = min(best[name], _seconds(step, device))
    return best


def _seconds(step: Step, device: str) -> float:
    if device != "cuda":
        began = process_time()
        step()
        return process_time() - began
    torch.cuda.synchronize()
    began = perf_counter()
    step()
    torch.cuda.synchronize()
    return perf_counter() - began


def row(name: str, case: str, seconds: dict[str, float], goal: str, device: str = "cpu") -> dict[str, object]:
    """A row of the table; ``overhead`` is ours over the base alone, the floor."""
    ours, peer, floor = seconds["ours"], seconds["peer"], seconds["floor"]
    return {
        "row": name,
        "case": case,
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "floor": floor,
        "floor_share": floor / ours,
        "overhead": ours / floor,
        "limit": peer / floor,
        "goal": goal,
        "unit": "s/step" if device == "cuda" else "CPU s/step",
    }
