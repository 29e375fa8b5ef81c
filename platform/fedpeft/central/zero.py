"""The DeepSpeed JSON of a job, from its TOML and the user's own file, which wins where the two do not contradict."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.bases.spec import QUANTIZED
from fedpeft.central.zero_keys import KNOWN, OFFLOAD, OURS, REFUSED, STAGE
from fedpeft.errors import ConfigError
from fedpeft.training.scaling import LEAST, START, WINDOW

if TYPE_CHECKING:
    from fedpeft.training.config import CentralConfig, DeepSpeed
    from fedpeft.training.settings import TrainSettings

BUCKET = 50_000_000
"""Most values of gradients that ranks add up at once; DeepSpeed's own 500 million are 2 GB on every GPU, however small the adapters."""


SCALING = {"loss_scale": 0, "initial_scale_power": log2(START), "loss_scale_window": WINDOW, "min_loss_scale": LEAST}
"""Our loss scaling in DeepSpeed's words; 0 is a scale that moves."""


def zero_of(config: CentralConfig, ranks: int) -> dict[str, Any]:
    """What DeepSpeed is told of a job. Raises `ConfigError` as `zero_json`, or when the base cannot lie where parameters are to be."""
    table = zero_json(config.deepspeed, config.training, ranks)
    kind, place = config.base.quantization, offload_of(table["zero_optimization"], "param")
    if place != "none" and kind in QUANTIZED:
        raise ConfigError(
            f"base.quantization = {kind!r} and parameters offloaded to {place!r}: codes are divided only once all are on the GPU; "
            "set base.quantization = 'bf16' or 'fp16', or deepspeed.offload_params = 'none'"
        )
    if place == "nvme" and kind != "bf16":
        raise ConfigError(
            f"base.quantization = {kind!r} and parameters offloaded to 'nvme': DeepSpeed swaps bf16 alone; set 'bf16', or use 'cpu'"
        )
    return table


def zero_json(deepspeed: DeepSpeed, settings: TrainSettings, ranks: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Raises:
        ConfigError: the user's file cannot be read, holds an unknown key, or contradicts the job's TOML; the batch cannot be divided; or a
            setting is of no meaning here.
    """
    if settings.proximal:
        raise ConfigError(f"training.proximal = {settings.proximal}: FedProx holds sites together, a central job has none; set it to 0")
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
    table = made if deepspeed.config is None else _merged(made, _read(deepspeed.config), deepspeed.config, settings, ranks)
    if settings.optimizer == "adamw8bit" and offload_of(table["zero_optimization"], "optimizer") == "nvme":
        raise ConfigError(
            "training.optimizer = 'adamw8bit' and optimizer states offloaded to 'nvme': DeepSpeed swaps float32; set 'adamw', or 'cpu'"
        )
    return table


def offload_of(zero: Mapping[str, Any], what: str) -> str:
    """Where ``what`` (``optimizer``, ``param``) lies: ``none``, ``cpu`` or ``nvme``."""
    return str((zero.get(f"offload_{what}") or {}).get("device", "none"))


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
    faults = [*_unknown(own), *_contradictions(own, settings, ranks)] or list(_misplaced(own, made))
    if faults:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    more = {key: value for key, value in own.items() if key not in OURS and key != "zero_optimization"}
    return made | more | {"zero_optimization": _stage(own, made)}


def _stage(own: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """``zero_optimization``: the user's alone where it names a stage, else on top of what the TOML makes."""
    zero = {key: value for key, value in own.get("zero_optimization", {}).items() if value != "auto"}
    return ({"reduce_bucket_size": BUCKET} if "stage" in zero else made["zero_optimization"]) | zero


def _unknown(own: Mapping[str, Any]) -> Iterator[str]:
    """Keys that do not exist, or are decided elsewhere."""
    for key in sorted(set(own) - KNOWN - set(OURS)):
        yield f"unknown key {key!r}; keys are {sorted(KNOWN | set(OURS))}"
    for key, where in REFUSED.items():
        if own.get(key):
            yield f"{key!r} is decided by {where}; leave it out"
    zero = own.get("zero_optimization", {})
    for name, table, allowed in (("zero_optimization", zero, STAGE), *((name, _table(zero, name), keys) for name, keys in OFFLOAD.items())):
        if not isinstance(table, Mapping):
            yield f"{name} = {json.dumps(table)}: must be an object"
            continue
        for key in sorted(set(table) - allowed):
            yield f"{name} has no key {key!r} that a job may set; keys are {sorted(allowed)}"


def _table(zero: Any, name: str) -> Any:
    return (zero.get(name) or {}) if isinstance(zero, Mapping) else {}


def _contradictions(own: Mapping[str, Any], settings: TrainSettings, ranks: int) -> Iterator[str]:
    """Keys that say another than the TOML."""
    asked = _asked(settings, ranks)
    for key, where in OURS.items():
        if key in own and own[key] != "auto" and not _agrees(own[key], asked[key]):
            yield f"{key} = {json.dumps(own[key])} contradicts {where}, which makes it {json.dumps(asked[key])}; change one"


def _misplaced(own: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[str]:
    """A stage that there is not, or offloads that it cannot have: DeepSpeed itself ignores them, or uses the host for the disk."""
    zero = _stage(own, made)
    if zero.get("stage") not in (0, 1, 2, 3):
        yield f"zero_optimization.stage = {json.dumps(zero.get('stage'))}: must be 0, 1, 2 or 3"
        return
    for what in ("param", "optimizer"):
        place = offload_of(zero, what)
        least = 0 if place == "none" else 3 if what == "param" or place == "nvme" else 1
        if place not in ("none", "cpu", "nvme"):
            yield f"offload_{what}.device = {json.dumps(place)}: must be none, cpu or nvme"
        elif zero["stage"] < least:
            yield f"offload_{what}.device = {json.dumps(place)} needs stage {least} or more, stage is {zero['stage']}; change one"
        elif place == "nvme" and not _table(zero, f"offload_{what}").get("nvme_path"):
            yield f"offload_{what}: device nvme needs nvme_path, a folder on a local disk"


def _asked(settings: TrainSettings, ranks: int) -> dict[str, Any]:
    """What the TOML makes of each key that it decides; a set of keys stands for a table of which more may be said."""
    kind = {"sgd": "SGD", "adamw8bit": "AdamW8bit"}.get(settings.optimizer, "AdamW")
    return {
        "train_micro_batch_size_per_gpu": settings.batch_size // ranks,
        "train_batch_size": settings.batch_size * settings.accumulate,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip,
        "optimizer": {"type": kind, "params": {"lr": settings.lr, "weight_decay": settings.weight_decay}},
        "scheduler": None,
        "fp16": {"enabled": settings.precision == "fp16"} | (SCALING if settings.precision == "fp16" else {}),
        "bf16": {"enabled": settings.precision == "bf16"},
    }


def _agrees(own: Any, asked: Any) -> bool:
    """Whether ``own`` says nothing else than ``asked``: equal, ``auto``, or a table whose common keys agree."""
    if isinstance(own, Mapping) and isinstance(asked, Mapping):
        return all(_agrees(own[key], asked[key]) for key in own if key in asked)
    return bool(own == "auto" or own == asked)
