"""`fedpeft compare`: one federation under several settings and seeds, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import output


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command()(compare)


def compare(
    federation: Annotated[Path, typer.Argument(help="The federation's TOML file.", metavar="FEDERATION.TOML")],
    sites: Annotated[
        list[Path] | None, typer.Argument(help="The sites' TOML files; none: those beside it.", metavar="[SITE.TOML]...")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting and its values, as in scheme.kind=alternating,fedavg; every combination is run."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination, with the file's seed and those after it.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the runs; what is done there is not run again.")] = Path("compare-run"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to standard error.")] = False,
) -> None:
    """Compare settings of a federation, method by scheme by seed: scores as mean ± deviation, bytes, seconds.

    Every run is the whole federation in this one process: no ports, no registry, the numbers of real rounds.
    """
    from rich.console import Console

    from fedpeft.compare import compare as run
    from fedpeft.compare import report
    from fedpeft.compare.drive import Request

    found = run(Request(federation, tuple(sites or ()), tuple(set_ or ()), seeds, out), Console(stderr=json))
    if json:
        return output.emit(found)
    columns, rows = report.table(found)
    print()
    output.listing(columns, {"mean ± standard deviation over seeds": rows})
    return print("", *report.notes(found), f"figures: {out / report.FIGURES}; every round: {out / report.HISTORY}", sep="\n")
