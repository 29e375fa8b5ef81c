"""What a federation trains, from its federation.toml: for those who must know that and nothing of the coordinator's own settings."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedpeft import config
from fedpeft.errors import ConfigError
from fedpeft.methods import read_method
from fedpeft.training.settings import TrainSettings

if TYPE_CHECKING:
    from fedpeft.methods import Method
    from fedpeft.tasks import Task

BESIDE = ("training", "start", "clusters")
"""Keys of a task's table that are not the task's own."""


class Outline(BaseModel):
    """The parts of a federation.toml that say what is trained; every other key is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = "federation"
    seed: int = 0
    rounds: int = 10
    base: dict[str, Any] = {}
    method: Any = "lora"
    training: dict[str, Any] = {}
    sharing: Any = None
    start: Any = None
    tasks: dict[str, dict[str, Any]]

    def adapter_method(self) -> Method:
        """The method of every adapter. Raises `ConfigError`."""
        try:
            return read_method(self.method)
        except ValueError as fault:
            raise ConfigError(str(fault)) from None

    def task(self, name: str) -> Task:
        """The task ``name``. Raises `ConfigError` when there is none, or it cannot be built."""
        from fedpeft.tasks import TASKS

        if name not in self.tasks:
            raise ConfigError(f"task {name!r} is not the federation's; it has {sorted(self.tasks)}")
        table = {key: value for key, value in self.tasks[name].items() if key not in BESIDE}
        try:
            task: Task = config.build(TASKS, {**table, "name": name}, f"tasks.{name}")
        except ValueError as fault:
            raise ConfigError(str(fault)) from None
        return task

    def settings(self, name: str) -> TrainSettings:
        """One site's training of task ``name`` in one round. Raises `ConfigError`."""
        try:
            return settings_of({**self.training, **self.tasks[name].get("training", {})})
        except ValueError as fault:
            raise ConfigError(f"tasks.{name}: {fault}") from None

    def start_seed(self, name: str) -> int:
        """The seed of round 0's values of task ``name``; tasks that share factors start alike."""
        return start_seed(self.seed, name, shared=self.sharing is not None)


def settings_of(table: dict[str, Any]) -> TrainSettings:
    """The settings of a table ``[training]``. Raises `ValueError` that names every fault."""
    unknown = sorted(set(table) - set(TrainSettings.__dataclass_fields__))
    if unknown:
        raise ValueError(f"training: unknown keys {unknown}; known keys are {sorted(TrainSettings.__dataclass_fields__)}")
    try:
        return _adapter().validate_python(table)
    except ValidationError as faults:
        lines = [f"training.{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})" for fault in faults.errors()]
        raise ValueError("; ".join(lines)) from None
    except ConfigError as fault:
        raise ValueError(str(fault)) from None


def start_seed(seed: int, task: str, *, shared: bool) -> int:
    """The seed of round 0's values of ``task`` in a federation of ``seed``."""
    return derive(seed, 0, "" if shared else task)


def derive(seed: int, *parts: object) -> int:
    """A 62-bit seed for one purpose, from the federation's seed."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


@cache
def _adapter() -> TypeAdapter[TrainSettings]:
    """Compiling it costs milliseconds."""
    return TypeAdapter(TrainSettings)
