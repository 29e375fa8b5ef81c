"""`fedpeft route` and `fedpeft evaluate`: ask a registry's adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import output
from fedpeft.cli.adapters import HERE, AsJson, Root


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command()(route)
    app.command()(evaluate)


def route(
    text: Annotated[str, typer.Argument(help="The request; - reads standard input.")],
    task: Annotated[str | None, typer.Option(help="Ask this task's adapter instead of routing.")] = None,
    registry: Root = HERE,
    quantization: Annotated[str, typer.Option(help="How to load the base: none, bf16, int8, nf4.")] = "none",
    json: AsJson = False,
) -> None:
    """Route a text to the task adapter it belongs to, or to the base alone, and answer it."""
    from fedpeft.service import Service

    request = sys.stdin.read() if text == "-" else text
    service = Service.open(registry, quantization)
    found = service.route(request, task)
    answer = service.answer(request, found.task) if found.task else None
    if json:
        return output.emit({"task": found.task, "score": found.score, "scores": found.scores, "answer": answer})
    for name, score in sorted(found.scores.items(), key=lambda pair: -pair[1]):
        print(f"  {name:<20} {score:.3f}{'  <- chosen' if name == found.task else ''}")
    print(answer if found.task else "no task is close enough: this request goes to the base alone")
    return None


def evaluate(
    data: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet rows; a `task` column names each row's task.")],
    registry: Root = HERE,
    quantization: Annotated[str, typer.Option(help="How to load the base: none, bf16, int8, nf4.")] = "none",
    routed: Annotated[bool, typer.Option(help="Choose the adapter by routing instead of by the task's name.")] = True,
    json: AsJson = False,
) -> None:
    """Score the registry's adapters on rows, each row answered by the adapter it is routed to."""
    from fedpeft.service import Service
    from fedpeft.tasks import Source, read_rows

    rows = read_rows(Source(path=str(data)))
    report = Service.open(registry, quantization).evaluate(rows, routed)
    if json:
        return output.emit(report)
    lines = [(task, line["rows"], line["routed right"], *line["scores"].items()) for task, line in report.items()]
    return output.table(
        str(data), ("task", "rows", "routed right", "score"), [(t, n, r, ", ".join(f"{k} {v:.3f}" for k, v in s)) for t, n, r, *s in lines]
    )
