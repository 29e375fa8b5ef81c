"""The service ``fedpeft.v1.Federation``: how a federation stands and what happens in it; reads its journal and events only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1.federation_pb2_grpc import FederationServicer
from fedpeft_coordinator.control.feed import Run
from fedpeft_coordinator.control.gate import CALLER, AbsentError, Caller, DeniedError
from fedpeft_coordinator.status import Watched, status

BATCH = 256 << 10
"""Bytes of the event file that are read at once."""
LINE = 64 << 10
"""Characters of one event's facts; longer ones are cut to their names."""


class FederationService(FederationServicer):
    """Tells of ``config``; None: this server stands alone."""

    def __init__(self, config: Watched | None, run: Run, poll: float) -> None:
        self.config, self.run, self.poll = config, run, poll

    @property
    def _federation(self) -> Watched:
        if self.config is None:
            raise AbsentError("federation: this server serves a registry alone; ask the one that `fedpeft coordinator up` runs")
        return self.config

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        """How it stands, as far as the caller's tasks go."""
        return message(_within(CALLER.get(), await self.run(status, self._federation)))

    async def Events(self, request: pb.EventsRequest, context: Any) -> AsyncIterator[pb.Event]:
        """Events from a place in the file on; they tell of all tasks, so none is told to whom some are hidden from."""
        caller = CALLER.get()
        if caller.tasks is not None:
            raise DeniedError(
                f"{caller.label} may see {sorted(caller.tasks)} only (control.scopes), and events tell of all tasks; ask Status"
            )
        path, position = self._federation.state / "events.jsonl", request.position
        while True:
            found = await self.run(lambda at: list(read(path, at)), position)
            for event in found:
                position = event.position
                yield event
            if not found and not request.follow:
                return
            if not found:
                await asyncio.sleep(self.poll)


def _within(caller: Caller, found: dict[str, Any]) -> dict[str, Any]:
    """What a status says of the caller's tasks; drop-outs name tasks and are left out."""
    if caller.tasks is None:
        return found

    def mine(rows: dict[str, Any]) -> dict[str, Any]:
        return {task: row for task, row in rows.items() if caller.sees(task)}

    sites = {name: {**row, "tasks": mine(row["tasks"]), "last_drop_out": ""} for name, row in found["sites"].items()}
    return {**found, "tasks": mine(found["tasks"]), "sites": sites}


def read(path: Path, position: int) -> Iterator[pb.Event]:
    """The whole lines of ``path`` from byte ``position`` on, some of them; a line cut by a crash is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(position)
        lines = file.readlines(BATCH)
    for line in lines:
        if not line.endswith(b"\n"):
            return
        position += len(line)
        event = _event(line, position)
        if event is not None:
            yield event


def _event(line: bytes, position: int) -> pb.Event | None:
    try:
        facts = json.loads(line)
        when, name = float(facts.pop("time")), str(facts.pop("event"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    text = json.dumps(facts)
    return pb.Event(position=position, time=when, event=name, facts=text if len(text) <= LINE else json.dumps({"cut": sorted(facts)[:100]}))


def message(found: dict[str, Any]) -> pb.StatusResponse:
    """What `fedpeft_coordinator.status.status` found, as a message."""
    return pb.StatusResponse(
        federation=found["federation"],
        running=found["running"] is not None,
        round=found["round"],
        rounds=found["rounds"],
        step=found["step"],
        base=found["base"] or "",
        masked=found["masked"],
        tasks={name: _task(row) for name, row in found["tasks"].items()},
        sites={name: _site(row) for name, row in found["sites"].items()},
    )


def _task(row: dict[str, Any]) -> pb.TaskStatus:
    return pb.TaskStatus(
        adapter=row["adapter"] or "",
        updated=row["updated"],
        skipped=row["skipped"],
        loss=row["loss"],
        scores=row["scores"],
        version=row["version"] or "",
        last_reason=row["last_reason"] or "",
        drift=row["drift"],
        privacy=_privacy(row["epsilon"]),
    )


def _privacy(spent: dict[str, Any] | None) -> pb.Privacy | None:
    return None if spent is None else pb.Privacy(**{key: value for key, value in spent.items() if key != "left"})


def _site(row: dict[str, Any]) -> pb.SiteStatus:
    return pb.SiteStatus(
        state=row["state"],
        refused=row["refused"] or "",
        rows=row["tasks"],
        device=row["device"],
        quantization=row["quantization"],
        base_loads=row["base_loads"],
        bytes_up=row["bytes_up"],
        bytes_down=row["bytes_down"],
        seconds_training=row["seconds_training"],
        seconds_answer=row["seconds_answer"],
        last_drop_out=row["last_drop_out"],
    )
