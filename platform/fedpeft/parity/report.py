"""The comparison as a person reads it: one table on the screen and in Markdown, one plot, and what the figures mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpeft.files import write_atomic
from fedpeft.parity.plot import svg
from fedpeft.parity.said import ARMS, COLUMNS, count, size
from fedpeft.tasks.metrics import LESS

PLOT = "parity.svg"


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Keep the figures as ``parity.json``, the page as ``parity.md``, the plot as ``parity.svg``. Raises `StorageError`."""
    for name, text in {"parity.json": json.dumps(found, indent=2), "parity.md": markdown(found), PLOT: svg(found)}.items():
        write_atomic(folder / name, text.encode())


def show(found: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print the table, what it means, and where everything lies."""
    table = Table(title=f"\nParity of {found['federation']}: the same rows, splits, start and number of examples", title_justify="left")
    for column in ("", *COLUMNS.values()):
        table.add_column(column, justify="right" if column else "left")
    for name, *cells in rows(found):
        table.add_row(name, *cells, style="bold" if name == "mean" else "")
    console.print(table)
    for line in [*notes(found), f"plot: {folder / PLOT}; figures: {folder / 'parity.json'}; page: {folder / 'parity.md'}"]:
        console.print(line, highlight=False, soft_wrap=True)


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table: name, then a cell an arm."""
    quality = [
        (f"{task}, {metric}", *(f"{found['scores'][arm][task]:.3f}" for arm in ARMS)) for task, metric in sorted(found["metrics"].items())
    ]
    mean = [("mean", *(f"{found['mean'][arm]:.3f}" for arm in ARMS))] if found["mean"] else []
    return [*quality, *mean, *(_row(name, found[key], said) for name, key, said in COSTS)]


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the figures mean, a line each."""
    engine = "one DeepSpeed job for all tasks" if found["engine"] == "deepspeed" else "each task by itself with the local engine"
    dropped = f"; {found['dropped']} contribution(s) dropped out, so the federation saw fewer" if found["dropped"] else ""
    less = "; of perplexity less is better" if set(found["metrics"].values()) & LESS else ""
    here = "; what the federation published was scored here, since its sites tell no scores of all rows"
    scored = here if found["scored_by"] == "here" else ""
    return [
        f"scores: on the held-out rows of all sites; local only: mean over the sites, each trained alone; central: {engine}{scored}{less}",
        f"examples seen: rounds x local steps x batch x sites, summed over tasks{dropped}",
        "bytes up: all that left the sites, which is nothing, updates, or their training rows (JSON Lines); bytes down: what reached them",
        "seconds: wall clock on this machine, all sites sharing it, from starting to the last score; peak memory: of the largest process",
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """The comparison as a Markdown page."""
    head = [f"# Parity of {found['federation']}", "", f"![Quality and cost of the three]({PLOT})", ""]
    table = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    body = [f"| {' | '.join(row)} |" for row in rows(found)]
    return "\n".join([*head, *table, *body, "", *(f"- {note}" for note in notes(found)), ""])


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("examples seen", "examples", count),
    ("bytes up", "bytes_up", size),
    ("bytes down", "bytes_down", size),
    ("seconds", "seconds", count),
    ("peak memory", "peak_bytes", size),
)


def _row(name: str, values: Mapping[str, float | None], said: Callable[[float], str]) -> tuple[str, ...]:
    return (name, *("-" if (value := values[arm]) is None else said(value) for arm in ARMS))
