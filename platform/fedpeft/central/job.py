"""A central job from its TOML to trained adapters: what every rank does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedpeft import locks
from fedpeft.adapters import Adapter, initial, make_spec
from fedpeft.bases import load_base, meta_base
from fedpeft.bases.base import Base
from fedpeft.bases.spec import QUANTIZED
from fedpeft.central import cards
from fedpeft.central.balancing import EXAMPLES, Balancing, Plan
from fedpeft.central.course import Course, Watched
from fedpeft.central.engine import ZeroEngine
from fedpeft.central.joint import Joint, JointTask
from fedpeft.central.keeping import Keeper
from fedpeft.central.pool import Pool
from fedpeft.central.progress import Progress, Scores
from fedpeft.central.reading import Examples, digest_of, examples, pools, read_together
from fedpeft.central.sampling import shares_of
from fedpeft.central.scoring import Scorer
from fedpeft.central.together import require_equal, together
from fedpeft.central.world import World, joined, place
from fedpeft.central.zero import stage_of, zero_of
from fedpeft.errors import AdapterError, ConfigError, StorageError
from fedpeft.mixtures.bank import SHARED
from fedpeft.mixtures.parts import parts_of
from fedpeft.tensors import Tensors
from fedpeft.training import checkpoint
from fedpeft.training.loop import job_digest, train
from fedpeft.training.settings import TrainJob, TrainResult

if TYPE_CHECKING:
    from fedpeft.training.config import CentralConfig


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A job's plain parts, the same on every rank."""

    pool: Pool
    held: Pool | None
    every: Mapping[str, Adapter]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Each task's own."""
        return {name: adapter for name, adapter in self.every.items() if name != SHARED}


@dataclass(frozen=True)
class Outcome:
    """What a job did, the scores by task of what it gives (`trained`), and the parts that it began from."""

    result: TrainResult
    scores: Scores
    ready: Prepared


def run(
    config: CentralConfig,
    world: World,
    starts: Mapping[str, Adapter] | None = None,
    progress: Progress | None = None,
    data: Mapping[str, Examples] | None = None,
    resume: bool = False,
) -> Outcome:
    """Train the job's adapters on all ranks of ``world``; what was trained lies in the checkpoint afterwards (`trained`).

    ``starts`` are adapters to go on from, by task; ``progress`` hears of each step, on every rank; ``data`` are the tasks' examples, where
    they were read already; with ``resume`` the last checkpoint must be of this very job.

    Raises:
        FedpeftError: with the exit code of what went wrong on any rank (see `fedpeft.errors`).
    """
    table = zero_of(config, world.size)
    with joined(world, config.deepspeed.timeout), ExitStack() as stack:
        place(world)
        together(world, lambda: stack.enter_context(_alone(config)) if world.rank == 0 else None)
        found = read_together(config, world) if data is None else data
        ready = together(world, lambda: prepare(config, starts or {}, found))
        require_equal(world, "data", digest_of(ready.pool, ready.held))
        together(world, lambda: Keeper.of(config).repair() if world.rank == 0 else None)
        base = together(world, lambda: load(config, world, table))
        if config.registry is not None and not _in_parts(config, table):
            together(world, lambda: cards.keep(config, base) if world.rank == 0 else None)
        return _train(Ground(config, world, table, base), ready, progress, resume)


def prepare(config: CentralConfig, starts: Mapping[str, Adapter], data: Mapping[str, Examples] | None = None) -> Prepared:
    """The examples, which are read unless they are given, and the adapters as they are at step 0.

    Raises:
        DataError: rows are missing or unreadable.
        AdapterError: a start is of another base, method or head, or no mixture is exact for the method.
    """
    base = meta_base(config.base)
    pool, held = pools(config, examples(config, base) if data is None else data)
    return Prepared(pool, held, beginning(config, starts, base))


def beginning(config: CentralConfig, starts: Mapping[str, Adapter], base: Base) -> dict[str, Adapter]:
    """All adapters by their name in a bank, as they are at step 0. Raises `AdapterError` as `prepare`."""
    tasks = {name: entry.task for name, entry in config.tasks.items()}
    specs = {name: make_spec(name, base, config.method, task.head) for name, task in tasks.items()}
    adapters = {name: _start(initial(base, spec, config.seed), starts.get(name)) for name, spec in specs.items()}
    parts_of(next(iter(specs.values())))
    if not config.shared:
        return adapters
    name = f"{config.name}.shared"
    spec = make_spec(name, base, config.shared_method or config.method, next(iter(tasks.values())).head)
    parts_of(spec)
    return adapters | {SHARED: _start(initial(base, spec, config.seed), starts.get(name))}


def load(config: CentralConfig, world: World, table: Mapping[str, Any]) -> Base:
    """The base on this rank's device; in stage 3 an unquantized one goes straight into partitions. Raises `BaseError`."""
    return load_base(config.base, world.device, zero=table["zero_optimization"] if _in_parts(config, table) else None)


def _in_parts(config: CentralConfig, table: Mapping[str, Any]) -> bool:
    """Whether no rank holds the base whole."""
    return stage_of(table) == 3 and config.base.quantization not in QUANTIZED


@dataclass(frozen=True)
class Trained:
    """What a job gives: its adapters by their name in a bank, after how many steps, their scores where they were taken, tasks' examples."""

    adapters: Mapping[str, Adapter]
    steps: int
    scores: Scores
    examples: Mapping[str, int]


def trained(config: CentralConfig, adapters: Mapping[str, Adapter]) -> Trained:
    """``adapters`` with the values of the job's last checkpoint, or of its best where the job asks for that.

    Raises:
        StorageError: there is none, or it is torn.
        AdapterError: it is of other adapters, or a value is not finite.
    """
    folder, keeper = config.state, Keeper.of(config)
    best = keeper.chosen()
    found = checkpoint.read(folder, best.file) if best else checkpoint.read(folder)
    if found is None:
        raise StorageError(f"{folder}: holds no whole checkpoint; train first, or give the output folder of the job")
    scores = next((kept.scores for kept in keeper.kept(found.job) if kept.step == found.tally.step), {})
    valued = {name: _valued(adapter, found.arrays, f"{name}|value") for name, adapter in adapters.items()}
    return Trained(valued, found.tally.step, scores, {name: int(found.arrays.get(f"{EXAMPLES}{name}", 0)) for name in config.tasks})


def _alone(config: CentralConfig) -> AbstractContextManager[None]:
    """One job an output: two would replace each other's checkpoints."""
    return locks.held(config.output / locks.NAME, "trains a job there", "give this one another `output`")


@dataclass(frozen=True)
class Ground:
    """What a job stands on: its file, this rank, DeepSpeed's table, and the base on this rank's device."""

    config: CentralConfig
    world: World
    table: Mapping[str, Any]
    base: Base


def _train(ground: Ground, ready: Prepared, progress: Progress | None, resume: bool) -> Outcome:
    config, world, table = ground.config, ground.world, ground.table
    with Joint.attach(config.name, ground.base, ready.pool, ready.adapters, ready.every.get(SHARED)) as joint:
        plan = Plan(config.balance, config.conflicts, config.validation if config.looks else None, ready.held, config.seed)
        balancing = Balancing(plan, joint, world, _judge(config, joint, ready.held, world, stage_of(table)))
        shares = shares_of(ready.pool, config.mixing)
        task = JointTask(config.name, ready.pool, shares, config.training.accumulate, balancing.going)
        engine = Watched(ZeroEngine(table, world, balancing))
        scorer = together(world, lambda: _scorer(config, joint, world, stage_of(table)))
        course = Course(config, world, engine, scorer, progress)
        job = TrainJob(joint.spec.layout.roles, config.seed, config.state, course.step, saved=course.save)
        identity = job_digest(cast(Any, joint), config.training, job, cast(Any, engine))
        together(world, lambda: _look(config.state, identity, resume) if world.rank == 0 else None)
        result = train(cast(Any, joint), cast(Any, task), cast(Any, None), config.training, job, cast(Any, engine))
        return Outcome(result, course.final(), ready)


def _look(state: Path, identity: str, resume: bool) -> None:
    """Tell when the last checkpoint is of another job; with ``resume`` raise `ConfigError` then, and `StorageError` when there is none."""
    found = checkpoint.read(state)
    if found is None and resume:
        raise StorageError(f"{state}: holds no whole checkpoint to go on from; use `fedpeft central train`")
    if found is None or found.job == identity:
        return
    said = f"{state}: the checkpoint there, of step {found.tally.step}, is of other settings or starting versions"
    if resume:
        raise ConfigError(f"{said}; undo what was changed (the file, --set, --from), or start over with `fedpeft central train`")
    log.warning("%s; this job begins at step 0 and will replace it", said)


def _scorer(config: CentralConfig, joint: Joint, world: World, stage: int) -> Scorer:
    scorer = Scorer.of(config, joint.bank, world, stage == 3)
    Keeper.of(config).require([name for name, data in scorer.tests.items() if data is not None])
    return scorer


def _judge(config: CentralConfig, joint: Joint, held: Pool | None, world: World, stage: int) -> Scorer | None:
    """Scores held-out rows by the metrics that patience goes by; None where it goes by losses alone."""
    metrics = config.patience_metrics
    if held is None or not metrics:
        return None
    tasks = {name: replace(config.tasks[name].task, metrics=(metric,)) for name, metric in metrics.items()}
    judge = Scorer(joint.bank, world, stage == 3, tasks, {name: held.data[held.names.index(name)] for name in tasks})
    judge.require_forwards()
    return judge


def _start(fresh: Adapter, given: Adapter | None) -> Adapter:
    if given is None:
        return fresh
    if given.spec.schema != fresh.spec.schema:
        raise AdapterError(
            f"adapter {fresh.spec.task}: the version to go on from is of another base, method or head than the job's; "
            "set [base] and [method] as `fedpeft adapters show` says, or start afresh"
        )
    return Adapter(fresh.spec, given.tensors)


def _valued(adapter: Adapter, arrays: Mapping[str, Any], key: str) -> Adapter:
    if key not in arrays or arrays[key].shape != (adapter.spec.layout.size,):
        raise AdapterError(f"adapter {adapter.spec.task}: the checkpoint does not hold it; was the job's file changed since?")
    tensors = Tensors(adapter.spec.layout, np.asarray(arrays[key], np.float32))
    if not tensors.finite:
        raise AdapterError(f"adapter {adapter.spec.task}: the checkpoint holds values that are not finite; lower training.lr, train again")
    return Adapter(adapter.spec, tensors)
