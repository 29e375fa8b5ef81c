"""What `fedpeft central transfer` prints and writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fedpeft.cli.output import table

if TYPE_CHECKING:
    from fedpeft.central.transfer import Transfer
    from fedpeft.training.config import CentralConfig

FILE = "transfer.json"


def show(config: CentralConfig, pairs: bool) -> None:
    """Run the jobs, print their table and leave it in the job's output as JSON. Raises `FedpeftError` as `measured`."""
    from fedpeft.central.transfer import measured
    from fedpeft.central.world import World
    from fedpeft.files import write_atomic
    from fedpeft.processes import free_port

    found = measured(config, World(port=free_port()), pairs=pairs)
    _print(found)
    if not config.shared:
        print(
            "the job shares nothing: gains are of the order of rows and of clipping alone; set shared = true to let tasks help each other"
        )
    path = config.output / FILE
    write_atomic(path, json.dumps(found.table, indent=2).encode())
    print(f"written to {path}")


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
