"""The ServerApp for plain `flwr run deploy/flower`: the same rounds, on a SuperLink that somebody else runs.

Flower's key names are understood: ``num-server-rounds``, ``fraction-train``, ``min-train-nodes`` override the federation's
file, which the run config names as ``federation``.
"""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft import plugins
from fedpeft.errors import ConfigError, LinkError
from fedpeft_coordinator.config import FederationConfig, load_federation
from fedpeft_coordinator.transport_flower import Connect, Session

app = ServerApp()
KEYS = {"num-server-rounds": "rounds", "fraction-train": "cohort.fraction", "min-train-nodes": "cohort.min_sites"}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config names. Raises `FedpeftError`, which ends the run with its message."""
    from rich.console import Console

    from fedpeft_coordinator import display
    from fedpeft_coordinator.events import Events
    from fedpeft_coordinator.lock import held
    from fedpeft_coordinator.up import run

    config = federation(context)
    with held(config.state), display.shown(config.rounds, Console()) as show:
        run(config, once(grid), Events(config.state / "events.jsonl", [show]))


def federation(context: Context) -> FederationConfig:
    """The configuration that the run config names, with Flower's keys on top (0 or an empty value leaves the file's)."""
    plugins.load()
    path = str(context.run_config.get("federation", ""))
    if not path:
        raise ConfigError("run config: federation is empty; flwr run ... --run-config 'federation=\"/path/to/federation.toml\"'")
    given = {ours: context.run_config.get(theirs) for theirs, ours in KEYS.items()}
    return load_federation(path, {ours: str(value) for ours, value in given.items() if value})


def once(grid: Grid) -> Connect:
    """The one run that Flower gave us; when it is lost, Flower ends us too."""
    given = [Session(grid)]

    def connect() -> Session:
        if not given:
            raise LinkError("the SuperLink no longer knows this run; start it again with flwr run: it goes on from the last committed step")
        return given.pop()

    return connect
