"""The TOML of a central job: base, method, tasks with their data, training, DeepSpeed, mixing, output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fedpeft import config
from fedpeft.bases import BaseSpec
from fedpeft.bases.spec import rooted_model
from fedpeft.config import Section
from fedpeft.errors import FedpeftError
from fedpeft.methods import METHODS, read_method
from fedpeft.tasks import TASKS, Source
from fedpeft.tasks.metrics import LESS
from fedpeft.training.balancing import BALANCES
from fedpeft.training.mixing import MIXINGS, Explicit, Proportional
from fedpeft.training.settings import TrainSettings
from fedpeft.training.trackers import TRACKERS

LOSS = "loss"
"""What `Validation.metric` calls the training loss."""
Name = Annotated[str, Field(pattern=f"^{config.NAME}$")]


def _reader(table: Mapping[str, type[Any]], noun: str) -> BeforeValidator:
    """Builds the plug-in that ``kind`` names in ``table``."""
    return BeforeValidator(lambda value: config.build(table, value, noun))


def _record(kind: type[Any], noun: str) -> BeforeValidator:
    """Builds a plain dataclass from a table; its own refusals count as faults of the file."""

    def build(value: Any) -> Any:
        try:
            return config.build({noun: kind}, {**value, "kind": noun} if isinstance(value, Mapping) else value, noun)
        except (FedpeftError, ValueError) as fault:
            raise ValueError(str(fault).removeprefix(f"{noun}: ")) from None

    return BeforeValidator(build)


class CentralTask(Section):
    """One task: what it is, where its rows lie, how many train rows count at most (``cap``).

    With ``stream`` its rows, of .jsonl files, may be more than memory holds: they are tokenised once, onto disk in the job's output.
    """

    task: Annotated[Any, _reader(TASKS, "task")]
    data: Source
    cap: int | None = Field(default=None, ge=1)
    stream: bool = False

    @model_validator(mode="after")
    def _stream_has_files(self) -> CentralTask:
        if self.stream and self.data.path is None:
            raise ValueError(f"stream = true needs data of .jsonl files, not {self.data.label!r}; give data.path, or leave stream out")
        return self


class DeepSpeed(Section):
    """ZeRO's ``stage``, where optimizer states and parameters are offloaded to, and the user's own DeepSpeed JSON (``config``), which wins.

    ``offload_params`` takes the base along; ``fedpeft central estimate`` says what each of them takes. A bare path in place of the table
    means ``config``. Ranks that wait for another longer than ``timeout`` seconds give up.
    """

    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    nvme: Path | None = None
    config: Path | None = None
    timeout: float = Field(default=600.0, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> DeepSpeed:
        for name, place in (("offload", self.offload), ("offload_params", self.offload_params)):
            least = 3 if name == "offload_params" or place == "nvme" else 2
            wanted = "3" if least == 3 else "2 or 3"
            if place != "none" and self.stage < least:
                raise ValueError(f"{name} = {place!r} needs stage {wanted}, stage is {self.stage}; raise stage or set {name} = 'none'")
        if ("nvme" in (self.offload, self.offload_params)) != (self.nvme is not None):
            raise ValueError(
                f"offload = {self.offload!r}, offload_params = {self.offload_params!r} and nvme = {self.nvme}: "
                "nvme is the folder of what is offloaded there; give both or none"
            )
        return self


class Evaluate(Section):
    """When the tasks' test rows are scored: after ``every`` so many optimizer steps, and always after the last."""

    every: int | None = Field(default=None, ge=1)


class Checkpoints(Section):
    """Which checkpoints stay beside the last: so many latest ones in all (``keep``), and the ``best``.

    ``best`` is by the mean of the tasks' first metrics (``mean``), by the worst of them (``worst``), or by that of one task (its name);
    what is published then is the best one, not the last.
    """

    keep: int = Field(default=1, ge=1)
    best: str | None = None


class Validation(Section):
    """Looks at rows held out of training: one before the first step, then one after every ``every`` steps.

    At most ``examples`` rows a task are held out, and at most a fifth of its training rows. With ``patience`` a task ends early: at its so
    many-th look in a row whose ``metric`` is not better than the best one by more than ``min_delta``, in nats or the metric's unit. That is
    ``loss``, or one of the task's metrics; a table names one by task, and of the others it is the loss.
    """

    every: int = Field(default=10, ge=1)
    examples: int = Field(default=64, ge=1)
    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    metric: str | dict[Name, str] = LOSS


def _method_or_none(value: Any) -> Any:
    return value if value is None else read_method(value)


class CentralConfig(Section):
    """One central job: one adapter per task, and with ``shared`` another that acts on every task's rows beside it.

    The shared adapter may have a ``shared_method`` of its own, such as a mixture whose router learns from all tasks' rows (``hydralora``,
    ``molora``).
    ``balance`` weighs the tasks' losses; ``conflicts`` says what becomes of gradients by which tasks disagree over the shared adapter.
    Paths are relative to the file once it came through `load_central`.
    """

    name: Name
    seed: int = Field(default=0, ge=0, lt=1 << 62)
    base: Annotated[Any, _record(BaseSpec, "base")]
    method: Annotated[Any, BeforeValidator(read_method)] = Field(default_factory=METHODS["lora"])
    training: Annotated[Any, _record(TrainSettings, "training")] = TrainSettings()
    deepspeed: DeepSpeed = DeepSpeed()
    mixing: Annotated[Any, _reader(MIXINGS, "mixing")] = Proportional()
    balance: Annotated[Any, _reader(BALANCES, "balance")] = BALANCES["equal"]()
    conflicts: Literal["ignore", "report", "pcgrad"] = "ignore"
    validation: Validation = Validation()
    tasks: dict[Name, CentralTask] = Field(min_length=1)
    shared: bool = False
    shared_method: Annotated[Any, BeforeValidator(_method_or_none)] = None
    evaluate: Evaluate = Evaluate()
    checkpoints: Checkpoints = Checkpoints()
    track: tuple[Annotated[Any, _reader(TRACKERS, "track")], ...] = ()
    output: Path
    registry: Path | None = None

    @property
    def state(self) -> Path:
        """Where the job's checkpoints lie."""
        return self.output / "checkpoint"

    @property
    def looks(self) -> bool:
        """Whether rows are held out of training."""
        return bool(self.balance.looks) or self.validation.patience is not None

    @property
    def patience_metrics(self) -> dict[str, str]:
        """By which metric patience judges, of the tasks where that is not the loss."""
        given = self.validation.metric
        table = given if isinstance(given, Mapping) else dict.fromkeys(self.tasks, given)
        return {name: metric for name, metric in table.items() if metric != LOSS}

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _path_is_config(cls, value: Any) -> Any:
        return {"config": value} if isinstance(value, str) else value

    @field_validator("track", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tables: Any) -> Any:
        """A task's name is its key; ``data`` and ``cap`` lie beside the task's own settings."""
        return {name: _entry(name, table) for name, table in tables.items()} if isinstance(tables, Mapping) else tables

    @model_validator(mode="after")
    def _weights_name_tasks(self) -> CentralConfig:
        if isinstance(self.mixing, Explicit) and set(self.mixing.weights) != set(self.tasks):
            raise ValueError(
                f"mixing.weights names {sorted(self.mixing.weights)}, the tasks are {sorted(self.tasks)}; give one weight per task"
            )
        return self

    @model_validator(mode="after")
    def _steps_hold_every_task(self) -> CentralConfig:
        size = self.training.batch_size * self.training.accumulate
        if size < len(self.tasks):
            raise ValueError(
                f"training: a step has {size} examples (batch_size x accumulate) for {len(self.tasks)} tasks; "
                f"every step must hold every task, raise one of the two to reach {len(self.tasks)}"
            )
        return self

    @model_validator(mode="after")
    def _best_can_be_told(self) -> CentralConfig:
        best, every, save = self.checkpoints.best, self.evaluate.every, self.training.save_every
        if best is None:
            return self
        if best not in ("mean", "worst", *self.tasks):
            raise ValueError(f"checkpoints.best = {best!r}: give 'mean', 'worst' or one of the tasks {sorted(self.tasks)}")
        if every is None or save % every:
            raise ValueError(
                f"checkpoints.best = {best!r} needs scores of every checkpoint: training.save_every is {save} steps, evaluate.every is "
                f"{every}; make save_every a multiple of it"
            )
        lower = {name for name, entry in self.tasks.items() if entry.task.headline in LESS}
        if best in ("mean", "worst") and lower and lower != set(self.tasks):
            raise ValueError(
                f"checkpoints.best = {best!r}: less is better of the first metric of {sorted(lower)}, perplexity, but not of the others'; "
                "give one task's name, or all tasks a first metric of one kind"
            )
        return self

    @model_validator(mode="after")
    def _method_is_of_something(self) -> CentralConfig:
        if self.shared_method is not None and not self.shared:
            raise ValueError(f"shared_method = {self.shared_method.kind!r}: no adapter is shared; set shared = true, or leave it out")
        return self

    @model_validator(mode="after")
    def _patience_judges_by_something(self) -> CentralConfig:
        metrics = self.patience_metrics
        if metrics and self.validation.patience is None:
            raise ValueError(
                f"validation.metric = {self.validation.metric!r}: nothing ends early by it; set validation.patience, or leave it out"
            )
        for name, metric in metrics.items():
            if name not in self.tasks:
                raise ValueError(f"validation.metric names {name!r}, the tasks are {sorted(self.tasks)}; name one of these")
            if metric not in self.tasks[name].task.metrics:
                raise ValueError(
                    f"validation.metric = {metric!r}: task {name} has metrics {list(self.tasks[name].task.metrics)}; give {LOSS!r} or one "
                    f"of these, a table {{ {name} = ... }} where tasks differ, or add it to tasks.{name}.metrics"
                )
        return self

    @model_validator(mode="after")
    def _conflicts_are_over_something(self) -> CentralConfig:
        if self.conflicts != "ignore" and not self.shared:
            raise ValueError(
                f"conflicts = {self.conflicts!r}: tasks with adapters of their own alone cannot conflict; set shared = true, or 'ignore'"
            )
        return self


def load_central(path: Path | str, overrides: Mapping[str, str] | None = None) -> CentralConfig:
    """Read a central job's file; relative paths in it are relative to the file, and so is a model that begins with ``.``.

    Raises:
        ConfigError: the file is missing or has faults; all of them are named.
    """
    job = config.load(path, CentralConfig, overrides)
    folder = Path(path).resolve().parent
    speed = job.deepspeed.model_copy(update=_beside(folder, {"nvme": job.deepspeed.nvme, "config": job.deepspeed.config}))
    tasks = {name: entry.model_copy(update={"data": entry.data.rooted(folder)}) for name, entry in job.tasks.items()}
    base = replace(job.base, model=rooted_model(folder, job.base.model))
    paths = _beside(folder, {"output": job.output, "registry": job.registry})
    return job.model_copy(update={**paths, "deepspeed": speed, "tasks": tasks, "base": base})


def _beside(folder: Path, paths: Mapping[str, Path | None]) -> dict[str, Path | None]:
    """``paths`` relative to ``folder``; absolute ones and those from ``~`` stay."""
    return {key: None if path is None else folder / path.expanduser() for key, path in paths.items()}


def _entry(name: str, table: Any) -> Any:
    if not isinstance(table, Mapping) or "task" in table:
        return table
    beside = {key: table[key] for key in ("data", "cap", "stream") if key in table}
    return {"task": {**{key: value for key, value in table.items() if key not in beside}, "name": name}, **beside}
