"""What the mixture benchmarks share: one random Llama, many adapters on it, ours and peft's, and steps to time on a CPU or a GPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
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

    @property
    def label(self) -> str:
        return f"T={self.tasks} S={self.tokens} r={self.rank}"

    def inputs(self, base: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        found = torch.randn(self.tasks, self.tokens, base.config.hidden_size, generator=generator)
        return found.to(base.device, base.trunk.embed_tokens.weight.dtype)


@dataclass(frozen=True)
class Bounds:
    """Seconds of the wall: to attach the peer's adapters, for the rounds of one comparison, and when to end (`perf_counter`)."""

    attach: float = inf
    rounds: float = inf
    until: float = inf


SIZES = {"cpu": (512, 4), "cuda": (2048, 4), "tiny": (64, 2)}
"""Hidden width and layers; ``tiny`` is for trying the code."""


def autocast(base: Any) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if base.device == "cuda" else nullcontext()


def base_of(device: str = "cpu", kind: str = "none", size: str | None = None) -> Any:
    """A frozen Llama with random weights, as a `Base` that was never on a disk; ``kind`` is its quantization: none, bf16 or nf4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpeft.bases import Base, BaseSpec, Fingerprint

    torch.manual_seed(0)
    hidden, depth = SIZES[size or device]
    shape = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=depth,
        vocab_size=1024,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(shape)
    dtype = torch.bfloat16 if kind == "bf16" or device == "cuda" else torch.float32
    model = model.to(dtype).requires_grad_(False).eval()
    if kind == "nf4":
        _quantize(model, device, dtype)
    return Base(BaseSpec("random", kind), Fingerprint("weights", "tokenizer", "", kind), "causal", None, shape, device, model, model.model)


def _quantize(model: Any, device: str, dtype: torch.dtype) -> None:
    from tests.bench._random import nf4_layer

    from fedpeft.bases.quantize import keep_layout

    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), leaf, nf4_layer(module.in_features, module.out_features, device, dtype))
    model.is_loaded_in_4bit = True
    keep_layout(model)


def case_of(base: Any, setting: Setting) -> str:
    """The setting and the model in words."""
    return f"{setting.label} {base.config.hidden_size}x{base.config.num_hidden_layers}{kind_of(base)}"


def kind_of(base: Any) -> str:
    """Quantization and device, where they are not the usual ones."""
    kind = "" if base.spec.quantization == "none" else f" {base.spec.quantization}"
    return kind + ("" if base.device == "cpu" else f" {base.device}")


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


class Peft:
    """peft's model with the same adapters, attached one after another.

    peft's own call walks all modules and adapters there are for each one, a minute for 128; ``quick`` gives all but the first to the layers
    themselves, as that call does in the end.
    """

    def __init__(self, base: Any, quick: bool = True) -> None:
        self._base, self._quick, self._names, self._layers = base, quick, list[str](), dict[str, Any]()
        self.model: Any = None

    def hold(self, adapters: dict[str, Any], seconds: float = inf) -> str:
        """Attach those that are missing, all that come gaining gradients; the reason, where it would take more than ``seconds``."""
        began, fault = perf_counter(), ""
        for name, adapter in adapters.items():
            if name in self._names or fault:
                continue
            start = perf_counter()
            self._attach(name, adapter)
            missing, here = len([other for other in adapters if other not in self._names]), len(self._names)
            expected = perf_counter() - began + (perf_counter() - start) * missing
            if here > 1 and expected > seconds:
                fault = (
                    f"no peer: peft would attach {len(adapters)} adapters in {expected:.0f} s ({here} took {perf_counter() - began:.1f} s)"
                )
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        return fault

    def _attach(self, name: str, adapter: Any) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        rank = adapter.spec.method.r
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        if self.model is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = get_peft_model(copy.deepcopy(self._base.model), config, adapter_name=name)
            self._layers = {stem: layer for stem, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}
        elif not self._quick:
            self.model.add_adapter(name, config)
        else:
            self.model.peft_config[name] = config
            for layer in self._layers.values():
                layer.update_layer(name, rank, lora_alpha=rank, config=config)
        self._names.append(name)
        with torch.no_grad():
            for tensor, values in adapter.tensors.named().items():
                stem, _, factor = tensor.removesuffix(".weight").rpartition(".")
                getattr(self._layers[stem], factor)[name].float().weight.copy_(torch.from_numpy(values))  # float32, as peft makes them


def peft_of(base: Any, adapters: dict[str, Any]) -> Any:
    """peft's model with all of ``adapters``, each attached by peft's own call."""
    peer = Peft(base, quick=False)
    peer.hold(adapters)
    return peer.model


def step_of(base: Any, trunk: nn.Module, setting: Setting, clear: Callable[[], object] = lambda: None) -> Step:
    """One pass of ``trunk`` over the batch: forward, or forward and backward to adapters and embeddings."""
    rows = setting.inputs(base).requires_grad_(setting.backward)

    def step() -> Any:
        clear()
        rows.grad = None
        with autocast(base), torch.set_grad_enabled(setting.backward):
            out = trunk(inputs_embeds=rows).last_hidden_state
        if setting.backward:
            out.float().square().mean().backward()
        return out

    return step


def least_of(steps: dict[str, Step], repeats: dict[str, int], device: str = "cpu", seconds: float = inf) -> dict[str, float]:
    """Seconds of each step's best round, rounds interleaved: CPU time, or on a GPU the time from the first kernel to the last.

    No round begins after ``seconds`` but the first.
    """
    best = dict.fromkeys(steps, inf)
    for name, step in steps.items():
        for _ in range(2 if device == "cuda" else int(repeats[name] > 1)):
            if seconds_of(step, device) > seconds / 4:
                break
    began = perf_counter()
    for number in range(max(repeats.values())):
        for name, step in steps.items():
            if number < repeats[name]:
                best[name] = min(best[name], seconds_of(step, device))
        if perf_counter() - began > seconds:
            break
    return best


def seconds_of(step: Step, device: str) -> float:
    """What one run of ``step`` takes: CPU time, or on a GPU the time until it is idle again."""
    if device != "cuda":
        began = process_time()
        step()
        return process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def row(name: str, case: str, seconds: dict[str, float], goal: str, device: str = "cpu") -> dict[str, object]:
    """A row of the table; ``overhead`` is ours over the base alone, the floor. Without a peer there is no ratio, and no goal of one."""
    ours, floor, peer = seconds["ours"], seconds["floor"], seconds.get("peer")
    found: dict[str, object] = {
        "row": name,
        "case": case,
        "ours": ours,
        "floor": floor,
        "floor_share": floor / ours,
        "overhead": ours / floor,
    }
    if peer is not None:
        found |= {"peer": peer, "ratio": peer / ours, "limit": peer / floor}
    goal = goal if peer is not None or goal.startswith("overhead") else ""
    return found | {"goal": goal, "unit": "s/step" if device == "cuda" else "CPU s/step"}


def line(found: dict[str, object]) -> str:
    """A row as one line, numbers cut to what can be read."""
    return str({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()})


def shown(rows: Iterator[dict[str, object]] | Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """All rows, each printed as soon as it is measured."""
    found = []
    for one in rows:
        print(line(one), flush=True)
        found.append(one)
    return found
