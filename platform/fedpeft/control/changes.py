"""What happens in a registry as a stream of changes: each event and each move of an alias, once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedpeft.registry import Registry
from fedpeft.registry.aliases import Move
from fedpeft.registry.log import Entry
from fedpeft.v1 import registry_pb2 as pb

Snapshot = Mapping[str, tuple[tuple[Entry, ...], tuple[Move, ...]]]
"""Events and moves by task."""
POLL = 0.5
"""Seconds between looks at a folder."""


def snapshot(registry: Registry) -> Snapshot:
    """All events and moves. Raises `StorageError` when a history is broken."""
    return {task: (registry.events(task), registry.moves(task)) for task in registry.tasks()}


@dataclass
class Places:
    """How far a watcher of ``tasks`` (none named: all) has read."""

    tasks: frozenset[str] = frozenset()
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def begin(self, found: Snapshot) -> None:
        """Tasks that are in ``found`` and have no place yet begin after what already happened."""
        for task, (entries, moves) in found.items():
            self.seen.setdefault(task, (len(entries), len(moves)))

    def news(self, found: Snapshot) -> Iterator[pb.Change]:
        """What is in ``found`` beyond the places, which move with it."""
        for task in sorted(found):
            if not self.tasks or task in self.tasks:
                for change in _changes(task, *found[task], self.seen.get(task, (0, 0))):
                    self.seen[task] = (change.seen.events, change.seen.moves)
                    yield change


def follow(registry: Registry, tasks: tuple[str, ...] = (), from_start: bool = False) -> Iterator[pb.Change]:
    """Changes in a registry here as anybody makes them, for ever. Raises `StorageError` when a history is broken."""
    places, stamp = Places(frozenset(tasks)), None
    if not from_start:
        places.begin(snapshot(registry))
    while True:
        found = registry.histories.stamp()
        if found != stamp:
            stamp = found
            yield from places.news(snapshot(registry))
        time.sleep(POLL)


def as_row(task: str, entry: Entry) -> pb.Version:
    """An event, without what it made current."""
    return pb.Version(
        task=task, number=entry.number, digest=entry.digest, action=entry.action, origin=entry.origin[:256], created=entry.created
    )


def as_alias(move: Move) -> pb.Alias:
    """A move of an alias."""
    return pb.Alias(task=move.task, alias=move.alias, digest=move.digest, number=move.number, by=move.by, created=move.created)


def _changes(task: str, entries: tuple[Entry, ...], moves: tuple[Move, ...], seen: tuple[int, int]) -> Iterator[pb.Change]:
    events = seen[0]
    for entry in entries[events:]:
        events = entry.number
        yield pb.Change(task=task, seen=pb.Seen(events=events, moves=seen[1]), version=as_row(task, entry))
    for move in moves[seen[1] :]:
        yield pb.Change(task=task, seen=pb.Seen(events=events, moves=move.number), alias=as_alias(move))
