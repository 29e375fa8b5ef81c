"""`fedpeft coordinator ...`; heavy imports inside the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli import output
from fedpeft.cli.changes import table
from fedpeft.cli.registries import AsJson, Who
from fedpeft.control.place import Place

app = typer.Typer(name="coordinator", help="Run a federation: rounds, cohorts, versions.", no_args_is_help=True)

File = Annotated[
    Path, typer.Argument(help="The federation's TOML file (`fedpeft example federation` prints one).", metavar="FEDERATION.TOML")
]
Where = Annotated[
    str,
    typer.Argument(
        help="The federation's TOML file, or grpc://HOST:PORT of the control plane of one that runs.", metavar="FEDERATION.TOML"
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: KEY=VALUE, for example cohort.deadline=60.")]


@app.command()
def up(file: File, set_: Set = None) -> None:
    """Run the federation, from the start or from the last committed step; ends when the last round is published."""
    from rich.console import Console

    from fedpeft_coordinator.config import load_federation
    from fedpeft_coordinator.up import up as run

    run(load_federation(file, table(set_, "cohort.deadline=60")), Console())


@app.command()
def status(where: Where, identity: Who = None, json: AsJson = False) -> None:
    """Show how far the federation is, per task and per site, and who dropped out why."""
    from rich.console import Console

    from fedpeft_coordinator.control.watching import standing
    from fedpeft_coordinator.up import summary

    found = standing(Place(where, identity))
    if json:
        return output.emit(found)
    return summary(found, Console())


@app.command()
def rounds(file: File, json: AsJson = False) -> None:
    """Print every round so far as a table: training loss, scores and bytes, a row a task; --json for scripts and plots."""
    from fedpeft.errors import StorageError
    from fedpeft.parity.federating import history
    from fedpeft_coordinator.config import load_federation
    from fedpeft_coordinator.events import read_events

    path = load_federation(file).state / "events.jsonl"
    found = history(list(read_events(path)))
    if not found:
        raise StorageError(f"{path}: tells of no finished round yet; `fedpeft coordinator status {file}` says how far it is")
    if json:
        return output.emit(found)
    columns = ("round", "task", "loss", "up", "down", "scores")
    return output.listing(columns, {"bytes are those of all tasks of a round": [_row(one) for one in found]})


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    loss = "-" if one["loss"] is None else f"{one['loss']:.4f}"
    scores = ", ".join(f"{name} {value:.4f}" for name, value in sorted(one["scores"].items()))
    return (str(one["round"]), one["task"], loss, *(output.size(one[f"bytes_{way}"]) for way in ("up", "down")), scores)


@app.command()
def watch(where: Where, identity: Who = None, json: AsJson = False) -> None:
    """Print what happened in the federation so far, and what happens, until interrupted; --json prints every event whole."""
    from rich.console import Console

    from fedpeft_coordinator.control.watching import happenings
    from fedpeft_coordinator.display import said

    console = Console()
    for event in happenings(Place(where, identity)):
        text = output.line(event) if json else said(event)
        if text:
            console.out(text, highlight=False) if json else console.print(text, highlight=False, soft_wrap=True)


@app.command()
def serve(
    registry: Annotated[Path, typer.Argument(help="Folder of the registry; its keys stay there also when its versions lie elsewhere.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the keys of the table control: host, port, tls, store, database, ...")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the table control: KEY=VALUE, for example port=8001.")
    ] = None,
) -> None:
    """Serve a registry and its router over gRPC, in the foreground, until it is interrupted."""
    from fedpeft.processes import end_service
    from fedpeft_coordinator.control.process import run
    from fedpeft_coordinator.control.settings import standalone

    settings = standalone(registry, config, table(set_, "port=8001"))
    control = settings.control
    by = "TLS, roles by token" if control.tokens else "mutual TLS, roles by certificate"
    kind = by if control.tls else f"no TLS, everybody is {control.role}"
    end_service(run(settings, lambda port: print(f"control plane of {registry} on grpc://{control.host}:{port} ({kind})", flush=True)))
