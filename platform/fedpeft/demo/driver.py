"""Drives the demo: writes the files, starts the commands, shows what happens, compares, reports."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fedpeft.demo import report
from fedpeft.demo.setting import Setting
from fedpeft.errors import ConfigError
from fedpeft.locks import NAME, clear, held
from fedpeft.parity import federating
from fedpeft.parity.children import check, ended, start
from fedpeft.parity.plan import MARK
from fedpeft.processes import free_port

POLL_SECONDS = 0.25
LIMIT_SECONDS = 1500.0


def drive(folder: Path, rounds: int, fresh: bool) -> None:
    """Run everything. Raises `FedpeftError` with the last words of the process that gave up."""
    setting = Setting(folder, rounds)
    console = Console()
    with held(folder / NAME, "runs fedpeft demo there", "name another folder"), federating.progress(console) as bar:
        prepare(setting, fresh)
        began = time.monotonic()
        federate(setting, bar)
        seconds = time.monotonic() - began
        compare(setting, bar)
    report.show(setting, seconds, console)


def prepare(setting: Setting, fresh: bool) -> None:
    """Make the folder and its TOML files, or keep those of an earlier run. Raises `ConfigError` rather than delete what is not ours."""
    folder = setting.folder
    if fresh and folder.exists():
        if {path.name for path in folder.iterdir()} - {NAME} and not (folder / MARK).exists():
            raise ConfigError(f"{folder}: exists and is not a demo's folder; name another one, nothing was deleted")
        clear(folder)
    if not (folder / MARK).exists():
        setting.write(free_port())


def federate(setting: Setting, bar: Progress) -> None:
    """Run coordinator and sites until the last round is published. Raises `FedpeftError`."""
    say = bar.console.print
    say(f"[bold]fedpeft demo[/bold]: {len(setting.sites)} sites, {setting.rounds} rounds, everything in {setting.folder}/")
    for site, clients in setting.sites.items():
        held = [task for task, holder in setting.pairs() if holder == site]
        say(f"  {site} holds the docs of {' + '.join(clients)} modules; tasks {', '.join(held)}")
    say("  (text of this Python's own library; labels are spread unevenly over the sites on purpose, as real sites differ)", soft_wrap=True)
    federating.federate(setting.folder, list(setting.sites), setting.rounds, bar, LIMIT_SECONDS)


def compare(setting: Setting, bar: Progress) -> None:
    """Train the comparisons, each kind in a process of its own."""
    folder = setting.folder
    runs = [
        start(which, ["fedpeft.demo.baselines", str(folder), which], folder / "logs" / f"{which}.log")
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
