"""One run: a federation of one cell's settings, with all its sites in this process; what it came to, from its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.compare import rooms
from fedpeft.parity import copies, fitting
from fedpeft.parity.federating import final_scores, history, travelled
from fedpeft.parity.plan import MARK, Plan, beside
from fedpeft.schemes import ifca

if TYPE_CHECKING:
    from fedpeft.adapters import Adapter

Event = dict[str, Any]


@dataclass(frozen=True)
class Rehearsals:
    """Runs one federation after another; what all share, such as the base, is loaded once."""

    @cached_property
    def sites(self) -> rooms.Sites:
        """The sites' half. Raises `FedpeftError`."""
        return rooms.sites()

    def __call__(self, listen: Callable[[Event], None], tables: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
        """Write ``tables`` as TOML files into the empty ``folder``, run the federation, say what it came to; ``listen`` hears its events.

        Raises:
            FedpeftError: what a federation of these settings would end with.
        """
        for name, table in tables.items():
            copies.write_toml(folder / name, table)
        events: list[Event] = []

        def hear(event: Event) -> None:
            events.append(event)
            listen(event)

        adapters = rooms.rounds()(folder / MARK, self.sites(beside(folder / MARK)), hear)
        return told(Plan.open(folder / MARK), adapters, events)


def told(plan: Plan, adapters: Mapping[str, Adapter], events: list[Event]) -> dict[str, Any]:
    """Scores by task's headline metric, bytes over all sites and rounds, seconds of the rounds, digests, and the history.

    Where sites tell no score of all held-out rows, as under privacy, the task is scored here.
    """
    names = declared(plan)
    metrics = {name: plan.tasks[names[name]].headline for name in adapters}
    by_sites = {name: found[metrics[name]] for name, found in final_scores(events).items()}
    unknown = {name: adapter for name, adapter in adapters.items() if name in plan.tasks and name not in by_sites}
    times = [event["time"] for event in events if event["event"] in ("plan", "round")]
    return {
        "metrics": metrics,
        "scores": by_sites | here(plan, unknown),
        "scored_here": sorted(unknown),
        **{f"bytes_{way}": count for way, count in travelled(events).items()},
        "seconds": times[-1] - times[0],
        "dropped": sum(len(found["drops"]) for event in events if event["event"] == "round" for found in event["tasks"].values()),
        "adapters": {name: adapter.tensors.digest for name, adapter in adapters.items()},
        "history": history(events),
    }


def here(plan: Plan, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """Scores on everybody's held-out rows."""
    from fedpeft.bases import load_base

    if not adapters:
        return {}
    base = load_base(plan.base)
    return {name: fitting.score(plan, base, adapter) for name, adapter in adapters.items()}


def declared(plan: Plan) -> dict[str, str]:
    """The task of federation.toml by the name of each adapter: clusters of a task are adapters of their own."""
    counts = {name: table.get("clusters", 0) for name, table in plan.outline.tasks.items()}
    return {made: name for name, count in counts.items() for made in (ifca.names(name, count) if count else [name])}
