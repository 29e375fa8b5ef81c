"""What training together gives each task, or takes from it: alone, with all others, and pair by pair, from jobs of the same settings.

Every job's step holds as many examples of each of its tasks as the whole job's step does, and takes as many steps, so that a task sees the
same number of its own examples whoever else is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from fedpeft.central.job import run
from fedpeft.central.progress import Progress
from fedpeft.central.reading import Examples, pools, read_together
from fedpeft.central.sampling import shares_of
from fedpeft.central.scoring import has_tests
from fedpeft.central.together import together
from fedpeft.central.world import World, joined
from fedpeft.central.zero import zero_of
from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks.metrics import upward
from fedpeft.training.mixing import Explicit

if TYPE_CHECKING:
    from fedpeft.training.config import CentralConfig

FOLDER = "transfer"
"""Where under the job's output the jobs lie that are compared; they go on where they were cut short."""
Values = Mapping[str, float]


@dataclass(frozen=True)
class Transfer:
    """Values of each task's first ``metrics``: ``alone``, ``together`` with all, and by pair ``a+b`` of each of the two."""

    metrics: Mapping[str, str]
    alone: Values
    together: Values
    pairs: Mapping[str, Values]

    def gain(self, task: str, values: Values) -> float:
        """By how much ``task`` is better in ``values`` than alone: above 0 where others help, whatever the metric's direction."""
        metric = self.metrics[task]
        return upward(metric, values[task]) - upward(metric, self.alone[task])

    @property
    def table(self) -> dict[str, Any]:
        """All of it, and the gains, JSON-ready."""
        return {
            "metric": dict(self.metrics),
            "alone": dict(self.alone),
            "together": dict(self.together),
            "gain": {task: self.gain(task, self.together) for task in self.alone},
            "pairs": {pair: {task: self.gain(task, values) for task in values} for pair, values in self.pairs.items()},
        }


Watch = Callable[["CentralConfig"], AbstractContextManager[Progress | None]]
"""Hears of a job that is about to run."""


def measured(config: CentralConfig, world: World, *, pairs: bool = False, watch: Watch = lambda _: nullcontext()) -> Transfer:
    """Run the jobs, one after the other, on all ranks of ``world``; rows are read and encoded once for all of them.

    Raises:
        ConfigError: there is one task only, or a job's step cannot be divided among the ranks.
        DataError: a task has no test rows.
        FedpeftError: as `job.run`.
    """
    names = list(config.tasks)
    if len(names) < 2:
        raise ConfigError(f"tasks: {names} cannot be compared with others; give the job two tasks or more")
    groups: list[tuple[str, ...]] = [*((name,) for name in names), tuple(names)]
    groups += combinations(names, 2) if pairs and len(names) > 2 else ()
    with joined(world, config.deepspeed.timeout):
        data = read_together(config, world)
        shares = shares_of(pools(config, data)[0], config.mixing)
        jobs = {group: part(config, group, shares) for group in groups}
        together(world, lambda: _check(config, jobs, world))
        found = {group: _values(job, world, data, watch) for group, job in jobs.items()}
    two = {"+".join(pair): found[pair] for pair in (combinations(names, 2) if pairs else ())}
    alone = {name: found[name,][name] for name in names}
    return Transfer({name: config.tasks[name].task.headline for name in names}, alone, found[tuple(names)], two)


def part(config: CentralConfig, names: Sequence[str], shares: Values) -> CentralConfig:
    """The job of the tasks ``names`` alone: a step holds their ``shares`` of the whole step's examples."""
    size = max(len(names), round(config.training.batch_size * sum(shares[name] for name in names)))
    mixing = config.mixing
    if isinstance(mixing, Explicit):
        mixing = Explicit({name: mixing.weights[name] for name in names})
    change = {
        "tasks": {name: config.tasks[name] for name in names},
        "mixing": mixing,
        "training": replace(config.training, batch_size=size),
        "output": config.output / FOLDER / ("together" if len(names) == len(config.tasks) else "+".join(names)),
        "track": (),
        "registry": None,
    }
    if config.checkpoints.best not in (None, "mean", "worst", *names):
        change["checkpoints"] = config.checkpoints.model_copy(update={"best": None})
    return config.model_copy(update=change)


def _check(config: CentralConfig, jobs: Mapping[tuple[str, ...], CentralConfig], world: World) -> None:
    """Refuse what can be refused before any job runs."""
    for name, entry in config.tasks.items():
        if not has_tests(entry):
            raise DataError(f"task {name}: has no test rows to compare it by; give its source a test split, or leave it out of [tasks]")
    for group, job in jobs.items():
        try:
            zero_of(job, world.size)
        except ConfigError as fault:
            raise ConfigError(
                f"job of {'+'.join(group)}, whose share is {job.training.batch_size} of {config.training.batch_size} examples: {fault}"
            ) from None


def _values(config: CentralConfig, world: World, data: Mapping[str, Examples], watch: Watch) -> dict[str, float]:
    with watch(config) as progress:
        scores = run(config, world, progress=progress, data={name: data[name] for name in config.tasks}).scores
    return {name: scores[name][entry.task.headline] for name, entry in config.tasks.items()}
