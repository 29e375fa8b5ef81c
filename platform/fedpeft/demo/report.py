"""The demo's report: what a person wants to know after a run, printed and kept as Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpeft.demo.setting import QUANTIZATION, TASKS, Setting
from fedpeft.errors import StorageError
from fedpeft.parity.federating import events_of, per_round

COLUMNS = ("task", "base only", "each site alone (mean)", "federated", "pooled")
EXAMPLE = "argument must be an integer, not a string"


def show(setting: Setting, seconds: float, console: Console) -> None:
    """Print the report and write ``report.md`` and ``report.json`` into the run's folder."""
    found = collect(setting, seconds)
    folder = setting.folder
    (folder / "report.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    (folder / "report.md").write_text(markdown(found), encoding="utf-8")
    quality = Table(title="\nQuality: macro-F1 on everybody's held-out rows", title_justify="left")
    for column in COLUMNS:
        quality.add_column(column, justify="left" if column == "task" else "right")
    for row in found["quality"]:
        quality.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row), style="bold" if row[0] == "mean" else "")
    console.print(quality)
    for line in lines(found):
        console.print(line, highlight=False, soft_wrap=True)


def collect(setting: Setting, seconds: float) -> dict[str, Any]:
    """Everything the report says, from the files of the run. Raises `StorageError` when one is missing or torn."""
    folder = setting.folder
    try:
        events = events_of(folder)
        local = json.loads((folder / "local.json").read_text(encoding="utf-8"))["local"]
        pooled = json.loads((folder / "pooled.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise StorageError(f"{folder}: the run's files are incomplete ({fault}); run the demo again") from None
    scores = [event for event in events if event["event"] == "scores"][-1]["tasks"]
    rows = [(task, pooled["base"][task], fmean(local[task].values()), scores[task]["macro_f1"], pooled["pooled"][task]) for task in TASKS]
    mean = ("mean", *(fmean(float(row[place]) for row in rows) for place in range(1, len(COLUMNS))))
    return {
        "quality": [*rows, mean],
        "local": local,
        "rounds": per_round(events),
        "seconds": seconds,
        "adapter_bytes": adapter_bytes(folder / "coordinator" / "registry"),
        "base_loads": base_loads(events),
        "registry": str(folder / "coordinator" / "registry"),
    }


def base_loads(events: list[dict[str, Any]]) -> dict[str, int]:
    """How often each site's worker loaded the base, as its last answer says."""
    return {event["site"]: event["base_loads"] for event in events if event["event"] == "answer"}


def adapter_bytes(registry: Path) -> int:
    """Bytes of all tasks' adapters in fp32, as plain FedAvg sends them each way to a site that holds every task."""
    from fedpeft.registry import Registry

    store = Registry(registry)
    return sum(4 * store.load(task).spec.layout.size for task in TASKS)


def lines(found: dict[str, Any]) -> list[str]:
    """The report below the table."""
    rounds = found["rounds"]
    mean = {key: fmean(row[key] for row in rounds) for key in ("up", "down", "asked", "seconds", "training")}
    plain = found["adapter_bytes"] / len(TASKS) * mean["asked"] / 1e6
    loads = ", ".join(f"{site} {count}" for site, count in sorted(found["base_loads"].items()))
    registry = found["registry"]
    return [
        f"  bytes per round, all sites: up {mean['up'] / 1e6:.2f} MB, down {mean['down'] / 1e6:.2f} MB "
        f"(plain FedAvg in fp32: {plain:.2f} MB each way)",
        f"  seconds per round: {mean['seconds']:.1f}, of which training {mean['training']:.1f}; "
        f"the whole federation took {found['seconds']:.0f} s",
        f"  base loads per site in the whole run ({QUANTIZATION}): {loads}",
        f"  adapters: {registry} (see: fedpeft adapters list --registry {registry})",
        "\nAsk one:",
        f'  .venv/bin/fedpeft route "{EXAMPLE}" --registry {registry}',
    ]


def markdown(found: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    head = [
        "# The demo's report",
        "",
        "Macro-F1 on everybody's held-out rows.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    rows = [f"| {' | '.join(value if isinstance(value, str) else f'{value:.3f}' for value in row)} |" for row in found["quality"]]
    table = ["", "| round | seconds | training | bytes up | bytes down |", "|---|---|---|---|---|"]
    table += [f"| {r['round']} | {r['seconds']:.1f} | {r['training']:.1f} | {r['up']} | {r['down']} |" for r in found["rounds"]]
    return "\n".join([*head, *rows, *table, "", *(line.strip() for line in lines(found)), ""])
