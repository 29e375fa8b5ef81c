"""The LoRA folder that vLLM loads: a PEFT folder without what its loader refuses or, worse, leaves out in silence.

Its loader (``PEFTHelper`` and ``LoRAModel.from_local_checkpoint``) takes one rank and alpha for all modules, LoRA pairs on linear
layers of the repeated blocks, and nothing beside them: no DoRA, no trained bias, no ``modules_to_save``.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft.adapters import save
from fedpeft.adapters.spec import Adapter
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.exporting.formats import Export, Written
from fedpeft.methods import Lora
from fedpeft.methods.values import has_two_halves

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` takes (``MaxLoRARanks``); an adapter's rank is at most that."""
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that vLLM makes one of: their parts are put together by these names, absent ones count as zero."""
SINGLE = ("o_proj", "down_proj", "out_proj", "dense", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h", "query_key_value")
"""Layers that keep their names in the models that take LoRA."""
MODULES = frozenset([*SINGLE, *FUSED, *(part for parts in FUSED.values() for part in parts)])


def write(export: Export, folder: Path, max_rank: int | None) -> Written:
    """Check, and write the PEFT folder. Raises `AdapterError` for what vLLM cannot take, `ConfigError` for a rank that it has not."""
    rank = server_rank(export.adapter, max_rank)
    refuse(export.adapter)
    save(export.adapter, folder)
    task = export.adapter.spec.task
    return Written(folder, (f"serve it with vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {task}={folder}",))


def server_rank(adapter: Adapter, max_rank: int | None) -> int:
    """The server's ``--max-lora-rank`` for this adapter."""
    if max_rank is not None and max_rank not in RANKS:
        raise ConfigError(f"export: max_rank {max_rank} is none of vLLM's; choose one of {list(RANKS)}")
    rank = _rank(adapter)
    if rank > (max_rank or RANKS[-1]):
        raise AdapterError(
            f"adapter {adapter.spec.task}: rank {rank} is above the server's {max_rank or RANKS[-1]}; lower it with adapters convert"
        )
    return max_rank or next(known for known in RANKS if known >= rank)


def refuse(adapter: Adapter) -> None:
    """Raise `AdapterError` naming what vLLM's loader does not take of this adapter."""
    spec, who = adapter.spec, f"adapter {adapter.spec.task}"
    assert isinstance(spec.method, Lora)
    if spec.method.dora:
        raise AdapterError(f"{who}: vLLM takes no DoRA; make a plain LoRA of it with fedpeft adapters convert")
    if spec.method.extra:
        raise AdapterError(
            f"{who}: has a second product beside the first, which vLLM takes not; make one LoRA of it with fedpeft adapters convert"
        )
    if spec.head.kind != "lm":
        raise AdapterError(f"{who}: has a classification head, which vLLM takes not with a LoRA; export it merged")
    if has_two_halves(spec.layout):
        raise AdapterError(f"{who}: is of an encoder-decoder, which vLLM takes not with a LoRA; export it merged")
    targets = {name.rpartition(".")[2] for name in _targets(adapter)}
    strangers = sorted(targets - MODULES)
    if strangers:
        raise AdapterError(
            f"{who}: targets {strangers}, which vLLM does not adapt; it adapts {sorted(MODULES)}; train without them, or merge"
        )


def _rank(adapter: Adapter) -> int:
    if not isinstance(adapter.spec.method, Lora):
        raise AdapterError(
            f"adapter {adapter.spec.task}: vLLM takes LoRA alone, this is {adapter.spec.method.kind}; use fedpeft adapters convert"
        )
    return adapter.spec.method.r


def _targets(adapter: Adapter) -> list[str]:
    return [entry.name.removesuffix(".lora_A.weight") for entry in adapter.spec.layout.entries if entry.role == "A"]
