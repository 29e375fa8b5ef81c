"""Arrow over a library of adapters, ours beside peft's `create_arrow_model`: seconds and peak memory of a forward, over the base alone.

Adapters have one direction that stands out, so that peft's 15 power iterations find it and both compute the same thing; it is checked.
"""

from __future__ import annotations

import copy
import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench._common import least
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft.adapters import Adapter, make_spec, save
from fedpeft.bases import BaseSpec, Fingerprint
from fedpeft.bases.base import Base
from fedpeft.methods import Lora
from fedpeft.mixtures import Bank
from fedpeft.mixtures.routers import routed
from fedpeft.routing import ArrowRouter, derive
from fedpeft.tasks import Generation
from fedpeft.tensors import Tensors

HIDDEN, LAYERS, BATCH, TOKENS, RANK, TOP = 512, 4, 4, 128, 8, 4
REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
Forward = Callable[[], torch.Tensor]


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Two rows for each number of experts: least CPU seconds over ``repeats`` interleaved forwards, then MiB above what was held."""
    torch.set_num_threads(1)
    return [row for experts in (8, 32) for row in _rows(experts, repeats)]


def _rows(experts: int, repeats: int) -> list[dict[str, object]]:
    case = f"arrow forward E={experts} r={RANK} top={TOP} hidden={HIDDEN} layers={LAYERS} B={BATCH} S={TOKENS}"
    base = _base()
    adapters = {f"t{place:02}": _adapter(base, f"t{place:02}", place) for place in range(experts)}
    ids = torch.randint(4, 500, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    plain, peers = copy.deepcopy(base.model), _peft(copy.deepcopy(base.model), adapters)
    with Bank.attach(base, Generation("any").head, adapters) as bank:
        bank.use(routed(ArrowRouter({name: derive(adapter.tensors).arrows for name, adapter in adapters.items()}, TOP)))
        forwards = {name: _forward(model, ids) for name, model in (("ours", bank.model), ("peer", peers), ("floor", plain))}
        gap = (forwards["ours"]() - forwards["peer"]()).abs().max() / forwards["peer"]().abs().max()
        assert gap < 1e-3, f"ours and peft's differ by {gap:.2g}"
        seconds = least(forwards, max(repeats, 3))
        memory = {name: _peak(work) for name, work in forwards.items()}
    return [_row(case, seconds, "CPU s"), _row(f"{case}, peak memory", memory, "MiB")]


def _row(case: str, seen: dict[str, float], unit: str) -> dict[str, object]:
    known: dict[str, object] = {"row": "A7", "case": case, "ours": seen["ours"], "peer": seen["peer"], "ratio": seen["peer"] / seen["ours"]}
    return known | {"floor": seen["floor"], "floor_share": seen["floor"] / seen["ours"], "unit": unit}


def _base() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * HIDDEN,
        num_attention_heads=8,
        vocab_size=512,
        max_position_embeddings=512,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config).requires_grad_(False).eval()
    return Base(BaseSpec("random"), Fingerprint("w", "t", "", "none"), "causal", None, config, "cpu", model, model.model)


def _adapter(base: Base, name: str, seed: int) -> Adapter:
    """Random factors, the first rank ten times as large in each."""
    spec = make_spec(name, base, Lora(r=RANK, targets=("all",)), Generation(name).head)
    tensors = Tensors(spec.layout, np.random.default_rng(seed).normal(0.0, 0.02, spec.layout.size).astype(np.float32))
    for tensor, values in tensors.named().items():
        first = values[0] if ".lora_A." in tensor else values[:, 0]
        first *= 10.0
    return Adapter(spec, tensors)


def _peft(model: torch.nn.Module, adapters: dict[str, Adapter]) -> torch.nn.Module:
    from peft import ArrowConfig, create_arrow_model

    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in adapters.items():
            save(adapter, Path(folder) / name)
        paths = [str(Path(folder) / name) for name in adapters]
        made: torch.nn.Module = create_arrow_model(model, paths, ArrowConfig(top_k=TOP, router_temperature=1.0)).eval()
    return made


def _forward(model: Any, ids: torch.Tensor) -> Forward:
    def forward() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids).logits
            return logits

    return forward


def _peak(work: Forward) -> float:
    """MiB of resident memory that ``work`` reached above where it began."""
    work()
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier forwards freed would be used again, unseen
    REFS.write_text("5")  # begins a new high-water mark
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 1) / 1024


def _status(name: str) -> int:
    """A field of this process's status, in KiB."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))
