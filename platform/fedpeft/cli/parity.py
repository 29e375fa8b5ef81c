"""`fedpeft parity`: local-only, federated and central training of the same tasks, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import output

Engine = Annotated[str, typer.Option(help="How the central arm trains: deepspeed, local, or auto: deepspeed where it can.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command()(parity)
    app.command("parity-arm", hidden=True)(arm)


def parity(
    federation: Annotated[Path, typer.Argument(help="The federation's TOML file.", metavar="FEDERATION.TOML")],
    sites: Annotated[
        list[Path] | None, typer.Argument(help="The sites' TOML files; none: those beside it.", metavar="[SITE.TOML]...")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: state, logs, table, plot; a run that was interrupted goes on.")] = Path(
        "parity-run"
    ),
    engine: Engine = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in the folder first.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to standard error.")] = False,
) -> None:
    """Compare each site alone, the federation, and all rows pooled: the same rows, splits, start and number of examples.

    All of it runs on this machine, the federation over a real coordinator and real sites on the loopback interface.
    """
    from rich.console import Console

    from fedpeft.parity import compare
    from fedpeft.parity.drive import Request
    from fedpeft.parity.report import show

    found = compare(Request(federation, tuple(sites or ()), out, engine, fresh), Console(stderr=json))
    return output.emit(found) if json else show(found, out, Console())


def arm(
    folder: Annotated[Path, typer.Argument()], name: Annotated[str, typer.Argument()], engine: Annotated[str, typer.Option()] = "local"
) -> None:
    """One arm of a comparison, in this process; `fedpeft parity` starts it."""
    from fedpeft.parity import work

    work(folder, name, engine)
