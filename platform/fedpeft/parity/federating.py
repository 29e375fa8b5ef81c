"""The federation itself on this machine: the coordinator and every site as the processes that a user starts, and what they tell."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedpeft.errors import CohortError
from fedpeft.parity.children import POLL_SECONDS, Child, added, check, ended, start
from fedpeft.parity.plan import MARK

EVENTS = Path("coordinator") / "events.jsonl"
"""Where in the folder of a run the coordinator tells what happens."""


def progress(console: Console) -> Progress:
    """A bar over rounds or other work, shown on a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def federate(folder: Path, sites: Sequence[str], rounds: int, bar: Progress, limit: float = inf, threads: int = 1) -> None:
    """Run coordinator and ``sites`` on the files in ``folder`` until the last round is published, or go on where they stopped.

    A site computes with ``threads`` threads where its file does not say how many.

    Raises:
        FedpeftError: what a process that gave up says, under its exit code; or nothing was finished within ``limit`` seconds.
    """
    row = bar.add_task("starting coordinator and sites", total=rounds)
    logs, seen = folder / "logs", len(added(folder / EVENTS, 0))
    coordinator = start("coordinator", ["fedpeft", "coordinator", "up", str(folder / MARK)], logs / "coordinator.log")
    running = [start(site, ["fedpeft", "client", "join", str(folder / f"{site}.toml")], logs / f"{site}.log", threads) for site in sites]
    with ended([coordinator, *running]):
        for event in follow(folder / EVENTS, seen, coordinator, running, limit):
            tell(event, bar, row)


def follow(path: Path, done: int, coordinator: Child, sites: list[Child], limit: float) -> Iterator[dict[str, Any]]:
    """The coordinator's events after the first ``done`` bytes as they come, until it ends.

    Raises:
        FedpeftError: the coordinator, or a site, gives up.
        CohortError: the coordinator has not ended after ``limit`` seconds.
    """
    deadline = time.monotonic() + limit
    while True:
        alive = coordinator.process.poll() is None
        fresh = added(path, done)
        yield from map(json.loads, fresh.splitlines())
        done += len(fresh)
        if not alive:
            return check(coordinator)
        for site in sites:
            if site.process.poll() is not None:
                check(site)
        if time.monotonic() > deadline:
            raise CohortError(f"federation: not finished after {limit:.0f} s; look at {coordinator.log.parent}")
        time.sleep(POLL_SECONDS)


def tell(event: dict[str, Any], bar: Progress, row: Any) -> None:
    """Show one event."""
    if event["event"] == "site":
        held = ", ".join(f"{task} ({rows} rows)" for task, rows in sorted(event["tasks"].items()))
        bar.console.print(f"  {event['site']} is here, on {event['device']}: {held}")
    elif event["event"] == "plan":
        phase = next(iter(event["tasks"].values()))["phase"]
        bar.update(row, description=f"round {event['round']} of {event['rounds']}: sites train (phase {phase})")
    elif event["event"] == "round":
        bar.update(row, completed=event["round"])
        losses = ", ".join(f"{task} {found['loss']:.3f}" for task, found in sorted(event["tasks"].items()) if found["loss"] is not None)
        drops = [f"{site} ({why})" for found in event["tasks"].values() for site, why in found["drops"].items()]
        told = f"training loss {losses}" if losses else "done; sites tell no loss"
        bar.console.print(f"  round {event['round']}: {told}" + (f"; dropped out: {', '.join(drops)}" if drops else ""))
    elif event["event"] == "published":
        bar.console.print(f"  published {event['task']} (sha256:{event['version'][:12]})")


def events_of(folder: Path) -> list[dict[str, Any]]:
    """The coordinator's events of a run. Raises `OSError` or `ValueError` when there are none, or they are torn."""
    return [json.loads(line) for line in (folder / EVENTS).read_text(encoding="utf-8").splitlines()]


def travelled(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Bytes ``up`` and ``down`` between all sites and the coordinator, over all rounds: training, scoring, keys of masks."""
    answers = [event for event in events if event["event"] == "answer"]
    return {way: sum(answer[f"bytes_{way}"] for answer in answers) for way in ("up", "down")}


def final_scores(events: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Task -> metric -> score on the sites' own count of their held-out rows after the last round.

    A task that a site of its cohort did not score is left out: its score is not of everybody's rows.
    """
    found = [event for event in events if event["event"] == "scores"][-1:]
    if not found:
        return {}
    missed: dict[str, int] = defaultdict(int)
    for event in events:
        if event["event"] == "answer" and event["kind"] != "train" and event["round"] == found[0]["round"]:
            for task, outcome in event["outcomes"].items():
                missed[task] += outcome != "ok"
    return {task: scores for task, scores in found[0]["tasks"].items() if scores and not missed[task]}


def per_round(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per training round: seconds from plan to mean, the longest training at a site, bytes each way over all sites."""
    times: dict[int, dict[str, float]] = defaultdict(dict)
    answers: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["event"] in ("plan", "combined"):
            times[event["round"]][event["event"]] = event["time"]
        elif event["event"] == "answer" and event["kind"] == "train":
            answers[event["round"]].append(event)
    return [
        {
            "round": number,
            "seconds": span["combined"] - span["plan"],
            "training": max(answer["train_seconds"] for answer in answers[number]),
            "up": sum(answer["bytes_up"] for answer in answers[number]),
            "down": sum(answer["bytes_down"] for answer in answers[number]),
            "asked": sum(len(answer["outcomes"]) for answer in answers[number]),
        }
        for number, span in sorted(times.items())
        if len(span) == 2 and answers[number]
    ]


def history(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each round and task: training loss, scores where the round was scored, and the round's bytes of all tasks together."""
    scores = {event["round"]: event["tasks"] for event in events if event["event"] == "scores"}
    ends = {event["round"]: event for event in events if event["event"] == "round"}
    answers: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        answers[event.get("round", 0)].append(event)
    return [
        {
            "round": number,
            "task": task,
            "loss": found["loss"],
            "scores": scores.get(number, {}).get(task, {}),
            **{f"bytes_{way}": count for way, count in travelled(answers[number]).items()},
        }
        for number, event in sorted(ends.items())
        for task, found in sorted(event["tasks"].items())
    ]
