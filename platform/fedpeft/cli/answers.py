"""`fedpeft route` and `fedpeft evaluate`: ask a registry's adapters, here or behind a control plane."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.cli import output
from fedpeft.cli.registries import HERE, AsJson, placed
from fedpeft.control.place import Place

if TYPE_CHECKING:
    from fedpeft.routing import Route

KINDS = "chain, mahalanobis, centroid, centroid3, gate, arrow, spectr, xlora, cluster, mean"
THERE = "there"
Which = Annotated[str, typer.Option(help=f"Who routes: {KINDS}.")]
Whoever = Annotated[
    str,
    typer.Option(
        help=f"Who routes: {KINDS}. A control plane's adapters are routed to and asked here, so that the text stays here; "
        f"{THERE}, or {THERE}:KIND, sends the text and lets it say the mixture: nothing is loaded and nothing answered here."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command()(placed(route))
    app.command()(placed(evaluate))


def route(
    text: Annotated[str, typer.Argument(help="The request, or the path of an image; - reads standard input.")],
    task: Annotated[str | None, typer.Option(help="Ask this task's adapter instead of routing.")] = None,
    router: Whoever = "chain",
    registry: Place = HERE,
    quantization: Annotated[str, typer.Option(help="How to load the base: none, bf16, fp16, int8, nf4.")] = "none",
    json: AsJson = False,
) -> None:
    """Route a text or an image to the mixture of task adapters it belongs to, or to the base alone; say why, and answer it."""
    from fedpeft.bases.images import asked, sent

    request = sys.stdin.read() if text == "-" else asked(text)
    where, _, kind = router.partition(":")
    if where == THERE:
        found, answer = _there(registry, sent(request), task, kind), None
    else:
        from fedpeft.service import Service

        service = Service.open(registry.open(), quantization)
        found = service.route(request, task, router)
        answer = service.answer(request, found)
    if json:
        return output.emit({**asdict(found), "task": found.task, "answer": answer})
    return _print(found, answer)


def _there(registry: Place, text: str, task: str | None, kind: str) -> Route:
    """What the control plane's own router says. Raises `ConfigError` when ``registry`` is a folder, `LinkError`, `PolicyError`."""
    from fedpeft.control.client import RemoteRouter

    with registry.link() as link:
        return RemoteRouter(link).ask(text, task, kind)


def _print(found: Route, answer: str | None) -> None:
    for name, score in sorted(found.scores.items(), key=lambda pair: -pair[1]):
        weight = found.weights.get(name, 0.0)
        print(f"  {name:<20} {score:.3f}{f'  <- weight {weight:.2f}' if weight else ''}")
    print(f"{found.router}: {found.why}")
    if found.task is None:
        print("no task is close enough: this request goes to the base alone")
    if answer is not None:
        print(answer)


def evaluate(
    data: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet rows; a `task` column names each row's task.")],
    registry: Place = HERE,
    quantization: Annotated[str, typer.Option(help="How to load the base: none, bf16, fp16, int8, nf4.")] = "none",
    routed: Annotated[bool, typer.Option(help="Choose the adapter by routing instead of by the task's name.")] = True,
    router: Which = "chain",
    json: AsJson = False,
) -> None:
    """Score the registry's adapters on rows, each row answered by the adapter it is routed to."""
    from fedpeft.service import Service
    from fedpeft.tasks import Source, read_rows

    rows = read_rows(Source(path=str(data)))
    report = Service.open(registry.open(), quantization).evaluate(rows, router if routed else None)
    if json:
        return output.emit(report)
    columns = ("rows", "routed right", "to the base", "scored")
    lines = [
        (task, *(line[column] for column in columns), ", ".join(f"{name} {score:.3f}" for name, score in line["scores"].items()))
        for task, line in report.items()
    ]
    return output.table(str(data), ("task", *columns, "score"), lines)
