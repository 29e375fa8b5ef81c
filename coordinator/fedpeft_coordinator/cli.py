"""`fedpeft coordinator ...`; heavy imports inside the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="coordinator", help="Run a federation: rounds, cohorts, versions.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="federation.toml")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: KEY=VALUE, for example cohort.deadline=60.")]


def _overrides(settings: list[str] | None) -> dict[str, str]:
    from fedpeft.errors import ConfigError

    pairs = dict(setting.partition("=")[::2] for setting in settings or [])
    if "" in pairs or any("=" not in setting for setting in settings or []):
        raise ConfigError(f"--set {settings}: needs KEY=VALUE, for example --set cohort.deadline=60")
    return pairs


@app.command()
def up(file: File, set_: Set = None) -> None:
    """Run the federation, from the start or from the last committed step; ends when the last round is published."""
    from rich.console import Console

    from fedpeft_coordinator.config import load_federation
    from fedpeft_coordinator.up import up as run

    run(load_federation(file, _overrides(set_)), Console())


@app.command()
def status(file: File, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show how far the federation is, per task and per site, and who dropped out why."""
    from rich.console import Console

    from fedpeft_coordinator.config import load_federation
    from fedpeft_coordinator.status import status as read

    found = read(load_federation(file))
    if json:
        import json as encoder

        print(encoder.dumps(found, indent=2))
        return
    from fedpeft_coordinator.up import summary

    summary(found, Console())


@app.command()
def serve(
    registry: Annotated[Path, typer.Argument(help="Folder of the registry; its keys stay there also when its versions lie elsewhere.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with the keys of [control]: host, port, tls, store, database, ...")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of [control]: KEY=VALUE, for example port=8001.")] = None,
) -> None:
    """Serve a registry and its router over gRPC, in the foreground, until it is interrupted."""
    from fedpeft_coordinator.control.process import run
    from fedpeft_coordinator.control.settings import standalone

    settings = standalone(registry, config, _overrides(set_))
    control = settings.control
    kind = "mutual TLS, roles by certificate" if control.tls else f"no TLS, everybody is {control.role}"
    run(settings, lambda port: print(f"control plane of {registry} on grpc://{control.host}:{port} ({kind})", flush=True))
