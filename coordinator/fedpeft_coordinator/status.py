"""How a federation stands, from its journal and events; reads only, and may be asked while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpeft.config import describe
from fedpeft.errors import StorageError
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.settings import Example, Off
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.events import read_events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.lock import holder
from fedpeft_coordinator.state import Round, Site


@dataclass(frozen=True)
class Watched:
    """What of a federation's settings its status needs, JSON-ready but for the paths."""

    name: str
    rounds: int
    masks: bool
    tasks: tuple[str, ...]
    state: Path
    registry_folder: Path
    database: str | None
    database_url: str
    privacy: Mapping[str, Any]

    @staticmethod
    def of(config: FederationConfig) -> Watched:
        """Of a federation.toml."""
        values = {item.name: getattr(config, item.name) for item in fields(Watched)}
        return Watched(**{**values, "tasks": tuple(config.tasks), "privacy": describe(config.privacy)})


def status(config: FederationConfig | Watched) -> dict[str, Any]:
    """Everything as JSON-ready values. Raises `StorageError` when nothing ran yet."""
    config = config if isinstance(config, Watched) else Watched.of(config)
    if not begun(config):
        raise StorageError(f"{config.state}: nothing ran here yet; start with `fedpeft coordinator up`")
    journal = Journal(config.database_url)
    rounds, sites = journal.rounds(), journal.sites()
    events = list(read_events(config.state / "events.jsonl"))
    return {
        "federation": config.name,
        "running": holder(config.state),
        "rounds": config.rounds,
        "round": rounds[-1].number if rounds else 0,
        "step": rounds[-1].step if rounds else "waiting for sites",
        "base": journal.notes().get("facts", {}).get("base"),
        "masked": config.masks,
        "privacy": config.privacy["kind"],
        "tasks": {name: {**_task(name, rounds), "epsilon": _epsilon(config, name, events)} for name in config.tasks},
        "sites": {name: _site(site, rounds, events) for name, site in sites.items()},
        "registry": str(config.registry_folder),
    }


def begun(config: FederationConfig | Watched) -> bool:
    """Whether anything may have run: a database of its own is asked, a file is looked for."""
    return config.database is not None or (config.state / "journal.sqlite").exists()


def _epsilon(config: Watched, task: str, events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What ``task`` has spent of its budget, by the ledger here or, where sites add noise to single rows, as they say; None: no privacy."""
    kind = str(config.privacy["kind"])
    if kind == Off.kind:
        return None
    budget, delta = float(config.privacy["epsilon"]), float(config.privacy["delta"])
    told = {event["site"]: event["epsilon"][task] for event in events if task in event.get("epsilon", {})}
    here = 0.0 if kind == Example.kind else Ledger(config.state / "ledger").spent(delta, task)
    spent = max(told.values(), default=0.0) if kind == Example.kind else here
    return {"spent": spent, "left": max(budget - spent, 0.0), "budget": budget, "delta": delta, "protects": kind, "sites": told}


def _task(name: str, rounds: list[Round]) -> dict[str, Any]:
    rows = [past.tasks[name] for past in rounds if name in past.tasks]
    scored = [row for row in rows if row.scores]
    versions = [row.version for row in rows if row.version]
    losses = [row.counters["train.loss"] for row in rows if row.counters.get("train.loss")]
    return {
        "adapter": rows[-1].current if rows else None,
        "updated": sum(bool(row.after) for row in rows),
        "skipped": sum(row.outcome == "skipped" for row in rows),
        "loss": losses[-1][0] / losses[-1][1] if losses and losses[-1][1] else None,
        "scores": dict(scored[-1].scores) if scored else {},
        "masked": bool(rows and rows[-1].sealed),
        "drift": next((dict(row.drift) for row in reversed(rows) if row.drift), {}),
        "group": (rows[-1].moved_to or rows[-1].group) if rows else "",
        "gain": next((dict(row.gain) for row in reversed(rows) if row.gain), {}),
        "version": versions[-1] if versions else None,
        "last_reason": rows[-1].reason if rows else "",
    }


def _site(site: Site, rounds: list[Round], events: list[dict[str, Any]]) -> dict[str, Any]:
    answers = [event for event in events if event["event"] == "answer" and event["site"] == site.name]
    trained = [event for event in answers if event["kind"] == "train"]
    drops = [
        {"round": past.number, "task": name, "reason": row.drops[site.name]}
        for past in rounds
        for name, row in past.tasks.items()
        if site.name in row.drops
    ]
    return {
        "tasks": dict(site.train),
        "device": site.device,
        "quantization": site.quantization,
        "base_loads": site.base_loads,
        "state": "refused" if site.refused else "vanished" if site.vanished else "ok",
        "refused": site.refused,
        "drop_outs": drops[-5:],
        "last_drop_out": "".join(f"round {drop['round']}, {drop['task']}: {drop['reason']}" for drop in drops[-1:]),
        "bytes_up": sum(event["bytes_up"] for event in answers),
        "bytes_down": sum(event["bytes_down"] for event in answers),
        "seconds_training": fmean([event["train_seconds"] for event in trained]) if trained else None,
        "seconds_answer": fmean([event["seconds"] for event in trained]) if trained else None,
    }
