"""What a job says of itself while it runs: to people, on a terminal or line by line, and to trackers."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.central.world import World
    from fedpeft.training.config import CentralConfig
    from fedpeft.training.trackers import Log, Tracker

Scores = Mapping[str, Mapping[str, float]]
LINES = 20
"""How many lines a job has, evaluations aside."""
SPAN = 20
"""Over how many steps speed is averaged."""


@dataclass(frozen=True)
class Report:
    """One step: ``loss`` is the mean over all terms, ``losses`` that of each task, in nats; ``scores`` by task where they were taken.

    ``told`` is what balancing says (`Balancing.told`).
    ``speed`` is real tokens (no padding) per second of all ranks, ``memory`` the most bytes that this rank has held at once: of its GPU,
    or of the process. Equal but for ``memory`` on all ranks.
    """

    step: int
    steps: int
    loss: float
    losses: Mapping[str, float]
    seconds: float
    speed: float
    memory: int
    scores: Scores = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """What is drawn, by name."""
        named = {"loss": self.loss, "tokens_per_second": self.speed, "memory_bytes": float(self.memory)}
        named |= {f"loss/{task}": loss for task, loss in self.losses.items()}
        return (
            named | dict(self.told) | {f"{metric}/{task}": value for task, found in self.scores.items() for metric, value in found.items()}
        )


Progress = Callable[[Report], None]


class Clock:
    """Seconds and tokens of the steps so far, without what lies between them."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._paused = 0.0
        self._steps: deque[tuple[float, int]] = deque([(0.0, 0)], SPAN + 1)

    @property
    def seconds(self) -> float:
        """Of training."""
        return time.perf_counter() - self._began - self._paused

    def step(self, tokens: int) -> float:
        """Count a step of ``tokens``; the tokens per second of the latest steps."""
        self._steps.append((self.seconds, self._steps[-1][1] + tokens))
        (before, first), (now, last) = self._steps[0], self._steps[-1]
        return (last - first) / max(now - before, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no time passes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began


def most_memory() -> int:
    """The most bytes held at once: of this process's GPU, or of the process itself."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def shown(config: CentralConfig, world: World) -> Iterator[Progress]:
    """Within, reports of rank 0 go to the terminal, or line by line where there is none, and to the job's trackers."""
    with ExitStack() as stack:
        hears: list[Progress] = []

        def hear(report: Report) -> None:
            for each in hears:
                each(report)

        if world.rank == 0:
            hears.append(stack.enter_context(_screen(config)) if sys.stdout.isatty() else Lines(config.training.steps))
            hears.append(stack.enter_context(_drawn(config)))
        yield hear


@dataclass(frozen=True)
class Lines:
    """A line every so many steps, and one for each task's scores."""

    steps: int

    def __call__(self, report: Report) -> None:
        """Print what is due."""
        if report.step % max(1, self.steps // LINES) == 0 or report.step == self.steps or report.scores:
            print(line_of(report), flush=True)
        for task, found in report.scores.items():
            print(f"  {task}: {scores_text(found)}", flush=True)


def line_of(report: Report) -> str:
    """One step in one line."""
    tasks = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
    tasks = "  ".join([tasks, *(f"{name} {value:.3f}" for name, value in told_of(report).items())])
    rest = f"{report.speed:.0f} tokens/s  {report.memory / 2**30:.2f} GiB  {report.seconds:.0f} s"
    return f"step {report.step}/{report.steps}  loss {report.loss:.4f}  {tasks}  {rest}"


def told_of(report: Report) -> dict[str, float]:
    """What balancing says, and of all cosines the smallest: pairs are many."""
    cosines = {name: value for name, value in report.told.items() if name.startswith("cosine/")}
    rest = {name: value for name, value in report.told.items() if name not in cosines}
    return rest | (dict([min(cosines.items(), key=lambda pair: pair[1])]) if cosines else {})


def scores_text(found: Mapping[str, float]) -> str:
    """Metrics and values."""
    return ", ".join(f"{metric} {value:.3f}" for metric, value in found.items()) or "no test rows"


@contextmanager
def _screen(config: CentralConfig) -> Iterator[Progress]:
    """A bar over the steps and a table of the tasks, redrawn in place."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(config.name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
    place = bar.add_task(config.name, total=config.training.steps, said="")
    latest: dict[str, Mapping[str, float]] = {}
    with Live(Group(bar), refresh_per_second=4) as live:

        def hear(report: Report) -> None:
            latest.update(report.scores)
            said = f"loss {report.loss:.4f}  {report.speed:.0f} tokens/s  {report.memory / 2**30:.2f} GiB"
            bar.update(place, completed=report.step, said=said)
            live.update(Group(bar, _tasks(report.losses, latest)))

        yield hear


def _tasks(losses: Mapping[str, float], scores: Scores) -> Any:
    from rich.table import Table

    metrics = list(dict.fromkeys(metric for found in scores.values() for metric in found))
    table = Table("task", "loss", *metrics)
    for task, loss in losses.items():
        found = scores.get(task, {})
        table.add_row(task, f"{loss:.4f}", *(f"{found[metric]:.3f}" if metric in found else "" for metric in metrics))
    return table


@contextmanager
def _drawn(config: CentralConfig) -> Iterator[Progress]:
    """To each tracker of the job, from the first report on."""
    trackers: Sequence[Tracker] = config.track
    logs: list[Log] = []

    def hear(report: Report) -> None:
        if not logs:
            settings = config.model_dump(mode="json", include={"name", "seed"}) | {"steps": config.training.steps, "lr": config.training.lr}
            logs.extend(tracker.open(config.name, config.output, settings, report.step) for tracker in trackers)
        for log in logs:
            log.write(report.step, report.values)

    try:
        yield hear
    finally:
        for log in logs:
            log.close()
