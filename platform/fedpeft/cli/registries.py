"""Which registry a verb works on: a folder here, or a control plane far away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = "registry"
Root = Annotated[str, typer.Option("--registry", envvar="FEDPEFT_REGISTRY", help="Folder of the registry, or grpc://HOST:PORT.")]
Who = Annotated[
    Path | None,
    typer.Option("--identity", envvar="FEDPEFT_IDENTITY", help="Certificate to show, NAME.pem; NAME.key and ca.crt lie beside it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ref = Annotated[str, typer.Argument(help="TASK (latest), TASK@NUMBER, TASK@ALIAS or sha256:PREFIX.")]


def opened(root: str, identity: Path | None = None) -> Any:
    """The registry at ``root``: a `fedpeft.registry.Registry` or a `fedpeft.control.client.RemoteRegistry`.

    Raises:
        AdapterError: the folder is not there.
        ConfigError: the address or the identity cannot be read.
    """
    from fedpeft.control.address import is_address

    return far(root, identity) if is_address(root) else near(root)


def near(root: str) -> Any:
    """The registry in folder ``root``. Raises `AdapterError` when it is not there, or far away."""
    from fedpeft.errors import AdapterError
    from fedpeft.registry import Registry

    if not Path(root).is_dir():
        raise AdapterError(
            f"{root}: no registry there; give --registry or set FEDPEFT_REGISTRY (a federation keeps it in its state folder)"
        )
    return Registry(Path(root))


def far(root: str, identity: Path | None) -> Any:
    """The registry behind address ``root``, with this user's cache. Raises `ConfigError`."""
    from fedpeft.control.address import Address, Identity
    from fedpeft.control.cache import Cache, home
    from fedpeft.control.client import RemoteRegistry
    from fedpeft.control.link import Link

    shown = identity or (Path(os.environ["FEDPEFT_IDENTITY"]) if os.environ.get("FEDPEFT_IDENTITY") else None)
    return RemoteRegistry(Link(Address.parse(root), Identity.beside(shown) if shown else None), Cache(home()))
