"""The demo under privacy: one federation three times, in real processes and under masks, and what each costs in accuracy and epsilon.

Without noise; with every site's share of noise under the masks, which hides whole sites; with DP-SGD at the sites, which hides single
rows. Same rows, method, seed and rounds; only tasks that all three sites hold, since a masked sum takes three. Held-out rows are
scored here, where they may all be seen: the private federations release no scores.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedpeft.demo import driver
from fedpeft.demo.setting import SITES, Setting
from fedpeft.parity import fitting
from fedpeft.parity.children import check, ended, start
from fedpeft.parity.federating import events_of, per_round
from fedpeft.parity.plan import Plan
from fedpeft.processes import hold

TASKS = ("area", "error")
EPSILON, DELTA = 8.0, 1e-5
COHORT = {"min_sites": SITES, "wait_for_sites": SITES, "deadline": 300.0}
RUNS: dict[str, dict[str, Any]] = {
    "without": {"wire": {"codec": "int8"}},
    "site": {
        "privacy": {"kind": "distributed", "epsilon": EPSILON, "delta": DELTA, "clip": 0.05},
        "wire": {"codec": {"kind": "ring", "bits": 16}},
    },
    "row": {"privacy": {"kind": "example", "epsilon": EPSILON, "delta": DELTA, "clip": 1.0}, "wire": {"codec": "int8"}},
}
SAID = {"without": "no noise", "site": "whole sites hidden", "row": "single rows hidden"}


def settings(folder: Path, rounds: int) -> dict[str, Setting]:
    """The federations by name, each in a folder of its own."""
    return {name: Setting(folder / name, rounds, tasks=TASKS, more={"cohort": COHORT, **more}) for name, more in RUNS.items()}


def drive(folder: Path, rounds: int, fresh: bool) -> None:
    """Run everything. Raises `FedpeftError` with the last words of the process that gave up."""
    console, seconds = Console(), {}
    made = settings(folder, rounds)
    for name, setting in made.items():
        console.print(f"[bold]{SAID[name]}[/bold]")
        driver.prepare(setting, fresh)
        with Progress(console=console, disable=not console.is_terminal) as bar:
            began = time.monotonic()
            driver.federate(setting, bar)
            seconds[name] = time.monotonic() - began
    scoring = start("scores", ["fedpeft.demo.private", str(folder), str(rounds)], folder / "scores.log")
    with ended([scoring]):
        scoring.process.wait()
    check(scoring)
    show(made, seconds, console)


def score(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Macro-F1 on everybody's held-out rows of the base alone and of every federation's adapters, by task."""
    from fedpeft.bases import load_base
    from fedpeft.demo.baselines import base_alone
    from fedpeft.registry import Registry

    plans = {name: Plan.of(setting.folder) for name, setting in settings(folder, rounds).items()}
    base = load_base(plans["without"].base)
    found: dict[str, dict[str, float]] = {"base": base_alone(plans["without"], base)}
    for name, plan in plans.items():
        registry = Registry(folder / name / "coordinator" / "registry")
        found[name] = {task: fitting.score(plan, base, registry.load(task)) for task in plan.tasks}
    return found


def spent(setting: Setting, task: str) -> dict[str, float]:
    """The epsilon of ``task``: at the coordinator for whole sites, and by site for what each one's ledger holds."""
    from fedpeft.privacy.ledger import Ledger

    folder = setting.folder
    found = {"coordinator": Ledger(folder / "coordinator" / "ledger").spent(DELTA, task)}
    for site in setting.sites:
        ledger = Ledger(folder / site / "ledger")
        found[site] = max(ledger.spent(DELTA, task), ledger.spent(DELTA, task, unit="example"))
    return found


def show(made: dict[str, Setting], seconds: dict[str, float], console: Console) -> None:
    """Print the report and write it as ``private.json`` and ``private.md`` beside the runs."""
    folder = made["without"].folder.parent
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    rows = {name: per_round(events_of(setting.folder)) for name, setting in made.items()}
    found = {
        "scores": scores,
        "epsilon": {name: {task: spent(setting, task) for task in TASKS} for name, setting in made.items()},
        "bytes_up": {name: fmean(row["up"] for row in found) for name, found in rows.items()},
        "seconds": seconds,
    }
    (folder / "private.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    (folder / "private.md").write_text(markdown(found), encoding="utf-8")
    table = Table("", "base only", *SAID.values(), title="\nMacro-F1 on everybody's held-out rows, under masks", title_justify="left")
    for line in lines(found):
        table.add_row(*line)
    console.print(table)
    for text in notes(found):
        console.print(text, highlight=False, soft_wrap=True)


def lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    scores = [(task, *(f"{found['scores'][name][task]:.3f}" for name in ("base", *SAID))) for task in TASKS]
    epsilon = [max(max(by.values()) for by in found["epsilon"][name].values()) for name in SAID]
    said = ("epsilon", "", *(f"{value:.2f}" if value else "none holds" for value in epsilon))
    size = ("bytes up a round", "", *(f"{found['bytes_up'][name]:,.0f}" for name in SAID))
    return [*scores, said, size, ("seconds", "", *(f"{found['seconds'][name]:.0f}" for name in SAID))]


def notes(found: dict[str, Any]) -> list[str]:
    """What the numbers mean."""
    site = ", ".join(f"{task} {by['coordinator']:.2f}" for task, by in found["epsilon"]["site"].items())
    return [
        f"  epsilon is a task's for the whole run at delta {DELTA:g}: of whole sites by the coordinator's ledger ({site}), of single rows "
        "by each site's own",
        "  what hides one site among three hides what they learned too: it takes many sites and few values (tests/bench/j_private.py)",
        "  DP-SGD pays for itself in large batches of many rows; this is the plain demo's batch of 16, unchanged",
    ]


def markdown(found: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    head = ["# The private demo's report", "", "| | base only | " + " | ".join(SAID.values()) + " |", "|---" * (2 + len(SAID)) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines(found)), "", *(note.strip() for note in notes(found)), ""])


def main() -> None:
    """Entry point of the scoring process."""
    import torch

    hold()
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    (folder / "scores.json").write_text(json.dumps(score(folder, rounds), indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
