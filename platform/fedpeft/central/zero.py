"""The DeepSpeed JSON of a job, from its TOML and the user's own file, which wins where the two do not contradict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from fedpeft.training.config import DeepSpeed
    from fedpeft.training.settings import TrainSettings

OURS = {
    "train_micro_batch_size_per_gpu": "training.batch_size over the ranks",
    "train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "gradient_clipping": "training.clip",
    "optimizer": "training.optimizer, lr and weight_decay",
    "scheduler": "training.schedule and warmup",
    "fp16": "training.precision",
    "bf16": "training.precision",
}
"""Keys that the job's TOML decides, and where: a user's file may repeat them, or say ``auto``, but not contradict."""

BUCKET = 50_000_000
"""Most values of gradients that ranks add up at once; DeepSpeed's own 500 million are 2 GB on every GPU, however small the adapters."""

KNOWN = frozenset(
    """
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state
    communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients activation_checkpointing aio
    flops_profiler comms_logger tensorboard wandb csv_monitor memory_breakdown amp elasticity checkpoint data_types
    seq_parallel_communication_data_type disable_allgather hybrid_engine compression_training data_efficiency
    curriculum_learning autotuning sparse_attention timers torch_autocast compile
    """.split()  # noqa: SIM905 - a list of words reads better
)
REFUSED = {
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "checkpoint": "our own checkpoints, which any number of ranks resumes",
    "elasticity": "resuming on another number of ranks",
    "activation_checkpointing": "training.checkpoint_activations",
    "hybrid_engine": "nothing: it generates text",
    "compression_training": "base.quantization",
    "data_efficiency": "mixing and the tasks' sources",
    "curriculum_learning": "mixing and the tasks' sources",
    "autotuning": "fedpeft central estimate",
    "sparse_attention": "the base's own attention",
}


def zero_json(deepspeed: DeepSpeed, settings: TrainSettings, ranks: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Raises:
        ConfigError: the user's file cannot be read, holds an unknown key, or contradicts the job's TOML; the batch cannot be divided; or a
            setting is of no meaning here.
    """
    if settings.proximal:
        raise ConfigError(f"training.proximal = {settings.proximal}: FedProx holds sites together, a central job has none; set it to 0")
    if settings.optimizer == "adamw8bit":
        raise ConfigError(
            "training.optimizer = 'adamw8bit': checkpoints of a central job fit any number of ranks, moments in blocks of codes do not; "
            "set 'adamw', whose moments ZeRO divides among the ranks"
        )
    if settings.batch_size % ranks:
        raise ConfigError(
            f"training.batch_size = {settings.batch_size} examples cannot be divided among {ranks} ranks; "
            f"set a multiple of {ranks}, for example {-(-settings.batch_size // ranks) * ranks}"
        )
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch_size // ranks,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip,
        "zero_optimization": stage_json(deepspeed),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }
    return made if deepspeed.config is None else _merged(made, _read(deepspeed.config), deepspeed.config, settings, ranks)


def stage_of(table: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed table."""
    return int(table.get("zero_optimization", {}).get("stage", 0))


def sized(table: Mapping[str, Any], values: int) -> dict[str, Any]:
    """``table`` with a bucket no larger than the ``values`` that train: DeepSpeed makes all of it on the GPU, though it is never fuller."""
    zero = table["zero_optimization"]
    return {**table, "zero_optimization": zero | {"reduce_bucket_size": max(1, min(int(zero.get("reduce_bucket_size", BUCKET)), values))}}


def stage_json(deepspeed: DeepSpeed) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` of a stage and its offloads."""
    table: dict[str, Any] = {"stage": deepspeed.stage, "reduce_bucket_size": BUCKET}
    if deepspeed.stage == 3:
        table |= {"stage3_param_persistence_threshold": 10_000, "stage3_prefetch_bucket_size": 50_000_000}
    for what, device in (("optimizer", deepspeed.offload), ("param", deepspeed.offload_params)):
        if device != "none":
            table[f"offload_{what}"] = {"device": device, "pin_memory": True} | (
                {"nvme_path": str(deepspeed.nvme)} if device == "nvme" else {}
            )
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise ConfigError(f"{path}: cannot be read as DeepSpeed's JSON ({fault}); correct deepspeed.config") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: holds a {type(table).__name__}; DeepSpeed's JSON is an object")
    return table


def _merged(made: dict[str, Any], own: dict[str, Any], path: Path, settings: TrainSettings, ranks: int) -> dict[str, Any]:
    unknown = sorted(set(own) - KNOWN - set(OURS))
    faults = [f"{path}: unknown key {key!r}; keys are {sorted(KNOWN | set(OURS))}" for key in unknown]
    faults += [f"{path}: {key!r} is decided by {where}; leave it out" for key, where in REFUSED.items() if own.get(key)]
    asked = _asked(settings, ranks)
    for key, where in OURS.items():
        if key in own and own[key] != "auto" and not _agrees(own[key], asked[key]):
            faults.append(
                f"{path}: {key} = {json.dumps(own[key])} contradicts {where}, which makes it {json.dumps(asked[key])}; change one"
            )
    if faults:
        raise ConfigError("\n".join(faults))
    more = {key: value for key, value in own.items() if key not in OURS and key != "zero_optimization"}
    zero = {key: value for key, value in own.get("zero_optimization", {}).items() if value != "auto"}
    kept = {"reduce_bucket_size": BUCKET} if "stage" in zero else made["zero_optimization"]
    return made | more | {"zero_optimization": kept | zero}


def _asked(settings: TrainSettings, ranks: int) -> dict[str, Any]:
    """What the TOML makes of each key that it decides; a set of keys stands for a table of which more may be said."""
    kind = {"sgd": "SGD"}.get(settings.optimizer, "AdamW")
    return {
        "train_micro_batch_size_per_gpu": settings.batch_size // ranks,
        "train_batch_size": settings.batch_size * settings.accumulate,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip,
        "optimizer": {"type": kind, "params": {"lr": settings.lr, "weight_decay": settings.weight_decay}},
        "scheduler": None,
        "fp16": {"enabled": False},
        "bf16": {"enabled": settings.precision == "bf16"},
    }


def _agrees(own: Any, asked: Any) -> bool:
    """Whether ``own`` says nothing else than ``asked``: equal, ``auto``, or a table whose common keys agree."""
    if isinstance(own, Mapping) and isinstance(asked, Mapping):
        return all(_agrees(own[key], asked[key]) for key in own if key in asked)
    return bool(own == "auto" or own == asked)
