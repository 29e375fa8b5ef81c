"""Drives a comparison: every cell that is not done yet, one after the other; what is done of it is never run again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from fedpeft import __version__, locks
from fedpeft.compare import report
from fedpeft.compare.grid import Cell, cells, varied
from fedpeft.compare.rehearsing import Event, Rehearsals
from fedpeft.config import read_toml
from fedpeft.errors import DataError, FedpeftError, StorageError, kind_of
from fedpeft.files import write_atomic
from fedpeft.parity import copies
from fedpeft.parity.federating import progress
from fedpeft.parity.plan import MARK, Plan, beside
from fedpeft.tasks import read_rows

ANSWER = "run.json"
Tables = Mapping[str, Mapping[str, Any]]
HERE: dict[str, dict[str, Any]] = {"cohort": {"deadline": 1.0}, "routing": {"moments": False}}
"""Sites in this process are there at once, or never; nothing is published, so nothing is sent for routers."""


@dataclass(frozen=True)
class Request:
    """What to compare: a federation.toml, its sites' files (none: those beside it), ``key=value,value`` texts, how many seeds, where."""

    federation: Path
    sites: tuple[Path, ...]
    settings: tuple[str, ...]
    seeds: int
    folder: Path


@dataclass(frozen=True)
class Files:
    """The user's files as they were read: the federation's first; ``rows`` is the SHA-256 of all sites' rows."""

    read: Mapping[Path, Mapping[str, Any]]
    rows: str

    @staticmethod
    def of(federation: Path, sites: Sequence[Path]) -> Files:
        """Read them. Raises `ConfigError` or `DataError`."""
        paths = (federation, *(sites or beside(federation)))
        rows = hashlib.sha256()
        for site in Plan.open(federation, sites).sites.values():
            for task, source in sorted(site.data.items()):
                rows.update(json.dumps([site.name, task, read_rows(source)], sort_keys=True, default=str).encode())
        return Files({path: read_toml(path) for path in paths}, rows.hexdigest())

    @property
    def seed(self) -> int:
        """The federation's own."""
        return int(next(iter(self.read.values())).get("seed", 0))

    def tables(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """What a run of ``cell`` is made of, by name of file. Raises `ConfigError`."""
        (federation, table), *sites = self.read.items()
        made = copies.arranged({federation: scored(cell.applied(table)), **{path: cell.held(site) for path, site in sites}}, 0)
        made[MARK] |= {key: {**made[MARK].get(key, {}), **here} for key, here in HERE.items()}
        return made

    def place(self, cell: Cell, folder: Path) -> Path:
        """The folder of ``cell`` under ``folder``, named by all that its numbers depend on. Raises `ConfigError`."""
        body = json.dumps([__version__, self.rows, self.tables(cell)], sort_keys=True, default=str)
        return folder / "runs" / hashlib.sha256(body.encode()).hexdigest()[:16]


def drive(request: Request, console: Console) -> dict[str, Any]:
    """Run what is not done, write the report, and return its figures.

    Raises:
        FedpeftError: what stopped it, or every run; the same call goes on.
    """
    files, settings = Files.of(request.federation, request.sites), varied(request.settings)
    grid = cells(settings, files.seed, request.seeds)
    rehearse, done = Rehearsals(), []
    console.print(f"[bold]fedpeft compare[/bold]: {len(grid)} runs of {request.federation}; in {request.folder}/", soft_wrap=True)
    with progress(console) as bar:
        row = bar.add_task("comparing", total=len(grid))
        for number, cell in enumerate(grid, 1):
            answer = _answer(files, cell, request.folder, partial(rehearse, _hearing(bar, row, cell)))
            bar.update(row, completed=number)
            bar.console.print(f"{number}/{len(grid)} {cell.said}: {report.line(answer)}", highlight=False, soft_wrap=True, markup=False)
            done.append({"settings": dict(cell.settings), "seed": cell.seed, **answer})
    _some(done)
    found = report.collect(request.federation, list(settings), done)
    report.write(found, done, request.folder)
    return found


def scored(table: dict[str, Any]) -> dict[str, Any]:
    """A federation that scores its adapters after the last round, unless privacy decides what is scored."""
    private = table.get("privacy", "none") not in ("none", {"kind": "none"})
    return table if private or table.get("evaluate_every") else {**table, "evaluate_every": table.get("rounds", 10)}


def _hearing(bar: Progress, row: TaskID, cell: Cell) -> Callable[[Event], None]:
    def hear(event: Event) -> None:
        if event["event"] == "plan":
            bar.update(row, description=f"{cell.said}, round {event['round']} of {event['rounds']}")

    return hear


def _answer(files: Files, cell: Cell, folder: Path, rehearse: Callable[[Tables, Path], dict[str, Any]]) -> dict[str, Any]:
    """What ``cell`` comes to, or why it comes to nothing. Raises `StorageError` or `DataError`: they would end every run."""
    try:
        place = files.place(cell, folder)
        if not (place / ANSWER).exists():
            if locks.holder(place / locks.NAME):
                return {"failed": "another process runs it now; the same command shows it later"}
            with locks.held(place / locks.NAME, "runs fedpeft compare there", "name another folder with --out"):
                _run(place, lambda: rehearse(files.tables(cell), place))
        return dict(json.loads((place / ANSWER).read_text(encoding="utf-8")))
    except (StorageError, DataError):
        raise
    except FedpeftError as fault:
        return {"failed": str(fault), "code": fault.exit_code}


def _run(place: Path, rehearse: Callable[[], dict[str, Any]]) -> None:
    """Keep what ``rehearse`` answers and the files that it ran; one that was cut short begins anew, so that its bytes are its own."""
    locks.clear(place)
    answer = rehearse()
    for folder in [path for path in place.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    write_atomic(place / ANSWER, json.dumps(answer).encode())


def _some(done: Sequence[Mapping[str, Any]]) -> None:
    """Raise the first run's fault where every run has one."""
    if all("failed" in run for run in done):
        raise (kind_of(done[0].get("code", 0)) or FedpeftError)(f"every run failed, the first: {done[0]['failed']}")
