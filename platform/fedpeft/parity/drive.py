"""Drives a comparison: copies the files, runs the arms that are not done yet one after the other, measures, reports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpeft.errors import ConfigError
from fedpeft.files import write_atomic
from fedpeft.locks import NAME, clear, held
from fedpeft.parity import copies, figures, joint, report
from fedpeft.parity.arms import write
from fedpeft.parity.children import added, lines, start
from fedpeft.parity.federating import events_of, federate, final_scores, progress, travelled
from fedpeft.parity.meter import metered
from fedpeft.parity.plan import Plan, beside
from fedpeft.processes import free_port

ENGINES = ("auto", "deepspeed", "local")
PROGRESS = ("  ", "step ")
"""How lines begin by which an arm, or the central job that it started, tells how far it is."""
STAMP = "parity.stamp.json"
"""What a folder's run is of, so that another one does not go on with it."""


@dataclass(frozen=True)
class Request:
    """What to compare and where: a federation.toml, its sites' files (none: those beside it), the run's folder, the central engine."""

    federation: Path
    sites: tuple[Path, ...]
    folder: Path
    engine: str = "auto"
    fresh: bool = False


def drive(request: Request, console: Console) -> dict[str, Any]:
    """Run what is not done yet, write the report, and return its figures.

    Raises:
        FedpeftError: what stopped it; the same call goes on.
    """
    plan = Plan.read(request.federation, request.sites)
    sites = request.sites or tuple(beside(request.federation))
    engine = chosen(plan, request.engine, console)
    with prepared(request, sites, engine):
        _run(plan, request, engine, console)
        found = figures.collect(plan, request.folder)
        report.write(found, request.folder)
    return found


def _run(plan: Plan, request: Request, engine: str, console: Console) -> None:
    """Every arm that is not done."""
    say = console.print
    say(f"[bold]fedpeft parity[/bold]: {plan.outline.name}, {len(plan.sites)} sites, {plan.outline.rounds} rounds; in {request.folder}/")
    _told(plan, console)
    for number, (name, arm) in enumerate(RUN.items(), 1):
        if (request.folder / f"{name}.json").exists():
            say(f"{number}/{len(RUN)} {SAID[name]}: done before")
            continue
        say(f"{number}/{len(RUN)} {SAID[name]}")
        with metered(figures.cost_path(request.folder, name)):
            arm(plan, request.folder, engine, console)


@contextmanager
def prepared(request: Request, sites: Sequence[Path], engine: str) -> Iterator[None]:
    """Hold the run's folder, filled, or taken up again; every start listens on another free port.

    Raises:
        ConfigError: the folder is of another run, or no run's: nothing of it is touched.
        StorageError: another process runs there, or the folder cannot be written.
    """
    folder, stamp = request.folder, request.folder / STAMP
    made = copies.tables(request.federation, sites, free_port())
    now = json.dumps({"files": copies.digest(request.federation, sites), "engine": engine})
    if folder.exists() and {path.name for path in folder.iterdir()} - {NAME} and not stamp.exists():
        raise ConfigError(f"{folder}: holds other things than a run of fedpeft parity; name another folder with --out, nothing was touched")
    with held(folder / NAME, "runs fedpeft parity there", "name another folder with --out"):
        if request.fresh:
            clear(folder)
        if stamp.exists() and stamp.read_text(encoding="utf-8") != now:
            raise ConfigError(f"{folder}: holds a run of other files or settings; give another --out, or start over with --fresh")
        write_atomic(stamp, now.encode())
        for name, table in made.items():
            copies.write_toml(folder / name, table)
        yield


def chosen(plan: Plan, engine: str, console: Console) -> str:
    """The central arm's engine, with a line where it is not what would be best. Raises `ConfigError`."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: choose one of {list(ENGINES)}")
    why = joint.cannot(plan) if engine != "local" else None
    if why is None:
        return "local" if engine == "local" else "deepspeed"
    if engine == "deepspeed":
        raise ConfigError(f"--engine deepspeed: {why}; --engine local trains each task by itself")
    console.print(f"central training without DeepSpeed, each task by itself with the local engine: {why}", highlight=False)
    return "local"


def cores() -> int:
    """Compute threads that an arm may use: all of this machine, or what ``OMP_NUM_THREADS`` says."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else os.cpu_count() or 1


def _local(_plan: Plan, folder: Path, engine: str, console: Console) -> None:
    _child("local", folder, engine, console)


def _central(_plan: Plan, folder: Path, engine: str, console: Console) -> None:
    _child("central", folder, engine, console)


def _federated(plan: Plan, folder: Path, engine: str, console: Console) -> None:
    with progress(console) as bar:
        federate(folder, list(plan.sites), plan.outline.rounds, bar, threads=max(1, cores() // len(plan.sites)))
    events = events_of(folder)
    told = final_scores(events)
    everybodys = set(told) == set(plan.tasks)
    if everybodys:
        scores = {name: told[name][task.headline] for name, task in plan.tasks.items()}
    else:
        _child("published", folder, engine, console)
        scores = json.loads((folder / "published.json").read_text(encoding="utf-8"))["scores"]
    dropped = sum(len(found["drops"]) for event in events if event["event"] == "round" for found in event["tasks"].values())
    by = "sites" if everybodys else "here"
    write(folder, "federated", {"scores": scores, "scored_by": by, "dropped": dropped, "bytes": travelled(events)})


RUN: dict[str, Callable[[Plan, Path, str, Console], None]] = {"local": _local, "federated": _federated, "central": _central}
SAID = {
    "local": "local only: each site trains on its own rows",
    "federated": "federated: the same sites in rounds, over a real coordinator",
    "central": "central: all rows pooled in one place",
}


def _child(arm: str, folder: Path, engine: str, console: Console) -> None:
    """Run one arm in a process of its own and repeat its progress. Raises what it says it ended with."""
    log = folder / "logs" / f"{arm}.log"
    before = len(added(log, 0))
    child = start(arm, ["fedpeft", "parity-arm", str(folder), arm, "--engine", engine], log, cores())
    for line in lines(child, before):
        if line.startswith(PROGRESS):
            console.print(f"  {line.strip()}", highlight=False, soft_wrap=True)


def _told(plan: Plan, console: Console) -> None:
    for site, holds in plan.sites.items():
        tasks = [name for name in holds.data if name in plan.tasks]
        rows = ", ".join(f"{task} ({len(plan.rows(task, 'train', site))} rows)" for task in tasks)
        console.print(f"  {site}: {rows or 'none of the tasks'}", highlight=False)
