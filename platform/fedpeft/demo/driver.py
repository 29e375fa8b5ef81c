"""Drives the demo: writes the files, starts the commands, shows what happens, compares, reports."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedpeft.demo import report
from fedpeft.demo.processes import Child, ended, start
from fedpeft.demo.setting import Setting
from fedpeft.errors import CohortError, ConfigError, FedpeftError
from fedpeft.processes import free_port, last_words

POLL_SECONDS = 0.25
LIMIT_SECONDS = 1500.0
MARK = "federation.toml"


def drive(folder: Path, rounds: int, fresh: bool) -> None:
    """Run everything. Raises `FedpeftError` with the last words of the process that gave up."""
    setting = Setting(folder, rounds)
    console = Console()
    prepare(setting, fresh)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        began = time.monotonic()
        federate(setting, bar)
        seconds = time.monotonic() - began
        compare(setting, bar)
    report.show(setting, seconds, console)


def prepare(setting: Setting, fresh: bool) -> None:
    """Make the folder and its TOML files, or keep those of an earlier run. Raises `ConfigError` rather than delete what is not ours."""
    folder = setting.folder
    if fresh and folder.exists():
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise ConfigError(f"{folder}: exists and is not a demo's folder; name another one, nothing was deleted")
        shutil.rmtree(folder)
    if not (folder / MARK).exists():
        setting.write(free_port())


def federate(setting: Setting, bar: Progress) -> None:
    """Run coordinator and sites until the last round is published."""
    folder = setting.folder
    say = bar.console.print
    say(f"[bold]fedpeft demo[/bold]: {len(setting.sites)} sites, {setting.rounds} rounds, everything in {folder}/")
    for site, clients in setting.sites.items():
        held = [task for task, holder in setting.pairs() if holder == site]
        say(f"  {site} holds the docs of {' + '.join(clients)} modules; tasks {', '.join(held)}")
    say("  (text of this Python's own library; labels are spread unevenly over the sites on purpose, as real sites differ)")
    row = bar.add_task("starting coordinator and sites", total=setting.rounds)
    coordinator = start("coordinator", ["fedpeft", "coordinator", "up", str(folder / MARK)], folder / "logs" / "coordinator.log")
    sites = [
        start(site, ["fedpeft", "client", "join", str(folder / f"{site}.toml")], folder / "logs" / f"{site}.log") for site in setting.sites
    ]
    with ended([coordinator, *sites]):
        for event in follow(folder / "coordinator" / "events.jsonl", coordinator, sites):
            tell(event, bar, row)


def follow(path: Path, coordinator: Child, sites: list[Child]) -> Iterator[dict[str, Any]]:
    """The coordinator's events as they come, until it ends. Raises `FedpeftError` when it, or a site, gives up."""
    done, deadline = 0, time.monotonic() + LIMIT_SECONDS
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
            raise CohortError(f"demo: not finished after {LIMIT_SECONDS:.0f} s; look at {coordinator.log.parent}")
        time.sleep(POLL_SECONDS)


def added(path: Path, offset: int) -> bytes:
    """The whole lines that were written to ``path`` after its first ``offset`` bytes."""
    if not path.exists():
        return b""
    with path.open("rb") as stream:
        stream.seek(offset)
        whole, newline, _torn = stream.read().rpartition(b"\n")
    return whole + newline


def check(child: Child) -> None:
    """Raise `FedpeftError` unless ``child`` ended well."""
    if child.process.returncode:
        raise FedpeftError(f"{child.name} ended with exit code {child.process.returncode}: {last_words(child.log)} (log: {child.log})")


def tell(event: dict[str, Any], bar: Progress, row: Any) -> None:
    """Show one event."""
    if event["event"] == "site":
        bar.console.print(
            f"  {event['site']} is here, on {event['device']}: "
            + ", ".join(f"{task} ({rows} rows)" for task, rows in sorted(event["tasks"].items()))
        )
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


def compare(setting: Setting, bar: Progress) -> None:
    """Train the comparisons, each kind in a process of its own."""
    folder = setting.folder
    runs = [
        start(which, ["fedpeft.demo.baselines", str(folder), str(setting.rounds), which], folder / "logs" / f"{which}.log")
        for which in ("local", "pooled")
        if not (folder / f"{which}.json").exists()
    ]
    total = len(list(setting.pairs())) + len({task for task, _ in setting.pairs()})
    row = bar.add_task("comparing: each site alone, and all rows pooled", total=total)
    if runs:
        bar.console.print("  comparing with each site on its own, and with all rows pooled in one place")
    with ended(runs):
        while any(run.process.poll() is None for run in runs):
            finished = sum(max(run.log.read_text(errors="replace").count(": ") - 1, 0) for run in runs)
            bar.update(row, completed=min(finished, total))
            time.sleep(POLL_SECONDS)
        for run in runs:
            check(run)
    bar.update(row, completed=total)
