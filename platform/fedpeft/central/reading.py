"""A job's examples: rows read, held out where something looks at them, encoded; of streamed tasks once a machine, onto disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from fedpeft.bases import meta_base
from fedpeft.central.held import held_out
from fedpeft.central.pool import Pool
from fedpeft.central.stored import Stored, stored
from fedpeft.central.together import together
from fedpeft.central.world import World
from fedpeft.errors import DataError
from fedpeft.tasks import Encoded, read_rows

if TYPE_CHECKING:
    from fedpeft.bases import Base
    from fedpeft.training.config import CentralConfig

ENCODED = "encoded"
"""Where under the job's output the examples of streamed tasks lie."""
Examples = tuple[Encoded, Encoded | None]
"""Of a task: those to train on, and those held out (None: nobody looks at any)."""


def read_together(config: CentralConfig, world: World) -> dict[str, Examples]:
    """`examples` on every rank, which all call this; what is streamed is encoded by the first of each machine, and opened by the others."""
    together(world, lambda: _encode_streams(config) if world.local_rank == 0 else None)
    return together(world, lambda: examples(config, meta_base(config.base)))


def examples(config: CentralConfig, base: Base) -> dict[str, Examples]:
    """The examples of each task.

    Raises:
        DataError: rows are missing or unreadable; of every task, a line each.
        StorageError: a stream cannot be stored.
    """
    return _each(list(config.tasks), lambda name: _encoded(config, name, base))


def pools(config: CentralConfig, data: Mapping[str, Examples]) -> tuple[Pool, Pool | None]:
    """``data`` as what trains, and as what is held out. Raises `ConfigError` and `DataError` as `Pool.of`."""
    tasks = {name: entry.task for name, entry in config.tasks.items()}
    pool = Pool.of(tasks, {name: data[name][0] for name in tasks})
    return pool, Pool.of(tasks, {name: cast(Encoded, data[name][1]) for name in tasks}) if config.looks else None


def digest_of(*pools: Pool | None) -> str:
    """SHA-256 over all sequences and labels."""
    hasher = hashlib.sha256()
    for pool in pools:
        hasher.update("\n".join(pool.names if pool else ()).encode())
        for part in pool.data if pool else ():
            if isinstance(part, Stored):
                hasher.update(part.digest.encode())
                continue
            for array in (*([np.concatenate(part.ids)] if not part.patches else part.ids), part.lengths, part.labels, part.starts):
                hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def _encode_streams(config: CentralConfig) -> None:
    names = [name for name, entry in config.tasks.items() if entry.stream]
    if names:
        base = meta_base(config.base)
        _each(names, lambda name: _encoded(config, name, base))


def _each(names: Sequence[str], read: Callable[[str], Examples]) -> dict[str, Examples]:
    """What ``read`` finds for every name. Raises `DataError` with the faults of all of them."""
    found, faults = {}, []
    for name in names:
        try:
            found[name] = read(name)
        except DataError as fault:
            faults.append(f"tasks.{name}: {fault}")
    if faults:
        raise DataError("\n".join(faults))
    return found


def _encoded(config: CentralConfig, name: str, base: Base) -> Examples:
    entry, most = config.tasks[name], config.validation.examples if config.looks else 0
    if entry.stream:
        return stored(config.output / ENCODED, entry.task, entry.data, base, entry.cap, most)
    rows = read_rows(entry.data, "train")[: entry.cap]
    apart = held_out(name, rows, most) if most else frozenset()
    kept = entry.task.encode([row for place, row in enumerate(rows) if place not in apart], base)
    return kept, entry.task.encode([rows[place] for place in sorted(apart)], base) if most else None
