"""A federation as others see it: how it stands and what happens in it, from its file here or through its control plane."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpeft.control.client import RemoteFederation
from fedpeft.control.place import Place
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.control.federation import read
from fedpeft_coordinator.status import status

POLL = 0.5
"""Seconds between looks at a file."""


def standing(where: Place) -> dict[str, Any]:
    """How the federation stands, JSON-ready. Raises `ConfigError`, `StorageError`, or `LinkError` and `PolicyError` from afar."""
    if not where.is_far:
        return status(load_federation(where.root))
    with where.link() as link:
        return described(RemoteFederation(link).status(), str(where))


def happenings(where: Place) -> Iterator[dict[str, Any]]:
    """Each event with its facts, from the first one on and then as they come, for ever. Raises as `standing` does."""
    if where.is_far:
        with where.link() as link:
            yield from map(_facts, RemoteFederation(link).events(follow=True))
    else:
        yield from map(_facts, _tail(load_federation(where.root).state / "events.jsonl"))


def _tail(path: Path) -> Iterator[pb.Event]:
    position = 0
    while True:
        for event in read(path, position):
            position = event.position
            yield event
        time.sleep(POLL)


def _facts(event: pb.Event) -> dict[str, Any]:
    return {"time": event.time, "event": event.event, **json.loads(event.facts)}


def described(said: pb.StatusResponse, registry: str) -> dict[str, Any]:
    """What `fedpeft_coordinator.status.status` found over there."""
    return {
        "federation": said.federation,
        "running": said.running,
        "rounds": said.rounds,
        "round": said.round,
        "step": said.step,
        "base": said.base,
        "masked": said.masked,
        "tasks": {name: _task(row) for name, row in sorted(said.tasks.items())},
        "sites": {name: _site(row) for name, row in sorted(said.sites.items())},
        "registry": registry,
    }


def _task(row: pb.TaskStatus) -> dict[str, Any]:
    names = ("adapter", "updated", "skipped", "version", "last_reason")
    loss = row.loss if row.HasField("loss") else None
    spent = _spent(row.privacy) if row.HasField("privacy") else None
    return {**_plain(row, names), "loss": loss, "scores": dict(row.scores), "drift": dict(row.drift), "epsilon": spent}


def _spent(row: pb.Privacy) -> Mapping[str, Any]:
    left = max(row.budget - row.spent, 0.0)
    return {**_plain(row, ("protects", "spent", "budget", "delta")), "left": left, "sites": dict(row.sites)}


def _site(row: pb.SiteStatus) -> dict[str, Any]:
    names = ("state", "refused", "device", "quantization", "base_loads", "bytes_up", "bytes_down", "last_drop_out")
    times = {name: getattr(row, name) if row.HasField(name) else None for name in ("seconds_training", "seconds_answer")}
    return {**_plain(row, names), **times, "tasks": dict(row.rows)}


def _plain(row: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}
