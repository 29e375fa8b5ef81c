"""What `fedpeft central transfer` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedpeft.cli.output import table

if TYPE_CHECKING:
    from fedpeft.central.progress import Progress
    from fedpeft.central.transfer import Transfer
    from fedpeft.central.world import World
    from fedpeft.training.config import CentralConfig

FILE = "transfer.json"


def show(config: CentralConfig, world: World, pairs: bool) -> int:
    """Run the jobs; rank 0 prints their table and leaves it in the job's output as JSON. Raises `FedpeftError` as `measured`."""
    from fedpeft.central.progress import shown
    from fedpeft.central.transfer import measured
    from fedpeft.files import write_atomic

    @contextmanager
    def watch(job: CentralConfig) -> Iterator[Progress]:
        if world.rank == 0:
            print(f"training {', '.join(job.tasks)}{'' if len(job.tasks) > 1 else ' alone'}:", flush=True)
        with shown(job, world) as progress:
            yield progress

    found = measured(config, world, pairs=pairs, watch=watch)
    if world.rank:
        return 0
    _print(found)
    if not config.shared:
        print(
            "the job shares nothing: gains are of the order of rows and of clipping alone; set shared = true to let tasks help each other"
        )
    path = config.output / FILE
    write_atomic(path, json.dumps(found.table, indent=2).encode())
    print(f"written to {path}")
    return 0


def _print(found: Transfer) -> None:
    rows = [
        (task, found.metrics[task], alone, found.together[task], found.gain(task, found.together)) for task, alone in found.alone.items()
    ]
    table("each task alone and with all others; gain above 0: others help", ["task", "metric", "alone", "together", "gain"], rows)
    if not found.pairs:
        return
    tasks = list(found.alone)
    gains = {(task, pair): found.gain(task, values) for pair, values in found.pairs.items() for task in values}

    def of(task: str, other: str) -> float | None:
        return next((gains[task, pair] for pair in (f"{task}+{other}", f"{other}+{task}") if (task, pair) in gains), None)

    table(
        "gain of the task on the left by each other alone",
        ["task", *tasks],
        [(task, *(of(task, other) for other in tasks)) for task in tasks],
    )
