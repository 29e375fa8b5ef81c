"""What a comparison came to: mean and standard deviation over seeds, one row a combination; and every round of every run as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedpeft.files import write_atomic
from fedpeft.parity.said import size
from fedpeft.tasks.metrics import LESS

Run = Mapping[str, Any]
FIGURES, HISTORY = "compare.json", "history.csv"
SHOWN = 3
"""Most tasks that have a column each; of more the mean is shown, where they have one metric."""


def collect(federation: Path, varied: Sequence[str], done: Sequence[Run]) -> dict[str, Any]:
    """The figures by combination of the settings ``varied``, in the order in which they were asked for."""
    groups: dict[str, list[Run]] = {}
    for run in done:
        groups.setdefault(json.dumps(run["settings"]), []).append(run)
    return {"federation": str(federation), "varied": list(varied), "cells": [_cell(runs) for runs in groups.values()]}


def line(answer: Run) -> str:
    """One run for people."""
    if "failed" in answer:
        return str(answer["failed"])
    scores = ", ".join(f"{task} {answer['metrics'][task]} {value:.3f}" for task, value in sorted(answer["scores"].items()))
    dropped = f", {answer['dropped']} dropped out" if answer["dropped"] else ""
    return f"{scores or 'no scores'}; {size(answer['bytes_up'])} up; {answer['seconds']:.0f} s{dropped}"


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the settings that vary, scores, bytes up and seconds of a run; why where a combination has no score."""
    cells = found["cells"]
    varied = [key for key in found["varied"] if len({cell["settings"][key] for cell in cells}) > 1]
    metrics = {task: metric for cell in cells for task, metric in cell["metrics"].items()}
    one = len(metrics) > SHOWN and all(cell["mean"] is not None for cell in cells if cell["scores"])
    names = [] if one else sorted(metrics)
    heads = [*(f"{task}, {metrics[task]}" for task in names), *(["mean of tasks"] if one or len(names) > 1 else [])]
    rows = []
    for cell in cells:
        scores = [_spread(cell["scores"].get(task)) for task in names]
        mean = [_spread(cell["mean"])] if len(heads) > len(names) else []
        rows.append([*(cell["settings"][key] for key in varied), *scores, *mean, *_costs(cell)])
    return [*varied, *heads, "up", "down", "seconds"], rows


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What the figures mean, and why runs have none, a line each."""
    metrics = {metric for cell in found["cells"] for metric in cell["metrics"].values()}
    seeds = sorted({seed for cell in found["cells"] for seed in cell["seeds"]})
    less = "; of perplexity less is better" if metrics & LESS else ""
    same = {key: {cell["settings"][key] for cell in found["cells"]} for key in found["varied"]}
    fixed = " ".join(f"{key}={value}" for key, values in same.items() if len(values) == 1 for value in values)
    if fixed:
        yield f"in every run {fixed}"
    yield f"scores on the held-out rows of all sites after the last round, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}{less}"
    yield "up and down: bytes between all sites and the coordinator in a whole run; seconds: of its rounds, one site after another"
    for cell in found["cells"]:
        for why, runs in sorted(cell["failed"].items()):
            yield f"{_said(cell['settings'])}: {runs} run(s) without a result: {why}"


def write(found: Mapping[str, Any], done: Sequence[Run], folder: Path) -> None:
    """Keep the figures as ``compare.json``, and every round and task of every run as ``history.csv``. Raises `StorageError`."""
    write_atomic(folder / FIGURES, json.dumps(found, indent=2).encode())
    write_atomic(folder / HISTORY, history(found["varied"], done).encode())


def history(varied: Sequence[str], done: Sequence[Run]) -> str:
    """CSV: the settings that vary, seed, round, task, training loss, metrics (empty where not scored), bytes of the round (all tasks)."""
    rows = [(run, row) for run in done for row in run.get("history", ())]
    metrics = sorted({metric for _, row in rows for metric in row["scores"]})
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow([*varied, "seed", "round", "task", "loss", *metrics, "bytes_up", "bytes_down"])
    for run, row in rows:
        scores = [row["scores"].get(metric) for metric in metrics]
        settings = [run["settings"][key] for key in varied]
        sheet.writerow([*settings, run["seed"], row["round"], row["task"], row["loss"], *scores, row["bytes_up"], row["bytes_down"]])
    return text.getvalue()


def _cell(runs: Sequence[Run]) -> dict[str, Any]:
    good = [run for run in runs if "failed" not in run]
    metrics = {task: metric for run in good for task, metric in run["metrics"].items()}
    scores = {task: _over([run["scores"][task] for run in good if task in run["scores"]]) for task in metrics}
    same = len(set(metrics.values())) == 1 and all(run["scores"].keys() == metrics.keys() for run in good)
    failed = [str(run["failed"]) for run in runs if "failed" in run]
    return {
        "settings": runs[0]["settings"],
        "seeds": [run["seed"] for run in runs],
        "metrics": metrics,
        "scores": {task: found for task, found in scores.items() if found},
        "mean": _over([fmean(run["scores"].values()) for run in good]) if same else None,
        **{key: fmean(run[key] for run in good) if good else None for key in ("bytes_up", "bytes_down", "seconds")},
        "adapters": [run["adapters"] for run in good],
        "failed": {why: failed.count(why) for why in failed},
    }


def _over(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, and sample standard deviation of two and more."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)} if values else None


def _spread(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.3f}" + (f" ± {found['std']:.3f}" if found["std"] is not None else "")


def _costs(cell: Mapping[str, Any]) -> list[str]:
    if cell["bytes_up"] is None:
        return ["-"] * 3
    return [size(cell["bytes_up"]), size(cell["bytes_down"]), f"{cell['seconds']:.1f}"]


def _said(settings: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "as the file says"
