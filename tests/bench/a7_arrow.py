"""Arrow over a library of adapters, ours beside peft's `create_arrow_model`: seconds and peak memory of a forward, over the base alone.

Adapters have one direction that stands out, so that peft's 15 power iterations find it and both compute the same thing; it is checked.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench._mixed import autocast, base_of, kind_of, least_of, shown

from fedpeft.adapters import Adapter, make_spec, save
from fedpeft.bases.base import Base
from fedpeft.methods import Lora
from fedpeft.mixtures import Bank
from fedpeft.mixtures.routers import routed
from fedpeft.routing import ArrowRouter, derive
from fedpeft.tasks import Generation
from fedpeft.tensors import Tensors

BATCH, TOKENS, RANK, TOP = 4, 128, 8, 4
REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
Forward = Callable[[], torch.Tensor]


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Two rows for each number of experts: least CPU seconds over ``repeats`` interleaved forwards, then MiB above what was held."""
    return list(rows(repeats))


def rows(repeats: int) -> Iterator[dict[str, object]]:
    """Row by row."""
    torch.set_num_threads(1)
    base = base_of()
    for experts in (8, 32):
        yield from measured(base, experts, max(repeats, 3))


def measured(base: Base, experts: int, repeats: int) -> Iterator[dict[str, object]]:
    """Time, then memory."""
    wide, deep = base.config.hidden_size, base.config.num_hidden_layers
    case = f"arrow forward E={experts} r={RANK} top={TOP} {wide}x{deep} B={BATCH} S={TOKENS}{kind_of(base)}"
    adapters = {f"t{place:02}": _adapter(base, f"t{place:02}", place) for place in range(experts)}
    ids = torch.randint(4, 500, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0)).to(base.device)
    plain, peers = copy.deepcopy(base.model), _peft(copy.deepcopy(base.model), adapters)
    with Bank.attach(base, Generation("any").head, adapters) as bank:
        bank.use(routed(ArrowRouter({name: derive(adapter.tensors).arrows for name, adapter in adapters.items()}, TOP)))
        models = {"ours": bank.model, "peer": peers, "floor": plain}
        forwards = {name: _forward(base, model, ids) for name, model in models.items()}
        gap = float((forwards["ours"]() - forwards["peer"]()).abs().max() / forwards["peer"]().abs().max())
        assert base.device == "cuda" or gap < 1e-3, f"ours and peft's differ by {gap:.2g}"  # in bf16 some tokens choose otherwise
        seconds = least_of(forwards, dict.fromkeys(forwards, repeats), base.device)
        yield _row(case, seconds, "s" if base.device == "cuda" else "CPU s") | {"gap": gap}
        peak = _device_peak if base.device == "cuda" else _peak
        yield _row(f"{case}, peak memory", {name: peak(work) for name, work in forwards.items()}, "MiB")


def _row(case: str, seen: dict[str, float], unit: str) -> dict[str, object]:
    known: dict[str, object] = {"row": "A7", "case": case, "ours": seen["ours"], "peer": seen["peer"], "ratio": seen["peer"] / seen["ours"]}
    return known | {"floor": seen["floor"], "floor_share": seen["floor"] / seen["ours"], "unit": unit}


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
    for name, parameter in made.named_parameters():
        if "lora_" in name:  # its router mixes types, and so fails, where autocast finds adapters in float32 on a base in bf16
            parameter.data = parameter.data.to(model.get_input_embeddings().weight.dtype)
    return made


def _forward(base: Base, model: Any, ids: torch.Tensor) -> Forward:
    def forward() -> torch.Tensor:
        with torch.no_grad(), autocast(base):
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


def _device_peak(work: Forward) -> float:
    """MiB of the device's memory that ``work`` reached above where it began."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before, 1) / 2**20


def _status(name: str) -> int:
    """A field of this process's status, in KiB."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    shown(rows(parser.parse_args().repeats))
