"""Where a registry is: a folder here, or a control plane far away. The one way in which verbs and servers open either."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.config import read_toml
from fedpeft.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedpeft.control.client import RemoteRegistry
    from fedpeft.control.link import Link
    from fedpeft.registry import Library, Registry
    from fedpeft.v1.registry_pb2 import Change

NAME = "registry"
"""What the folder of a registry is called, in its federation's state folder or beside a central job."""
FEDERATIONS = ("federation.toml", "coordinator/federation.toml")
"""Where a federation's file lies, from its coordinator's folder or from the one that `fedpeft init` wrote."""


def look(folder: Path) -> Path | None:
    """The registry of the federation or the jobs in ``folder``; None where there is none. Raises `ConfigError` on a broken file."""
    return next((found for found in _candidates(folder) if found.is_dir()), None)


def beside(folder: Path) -> str:
    """The registry that `look` finds in ``folder``, or where one may come to be."""
    return str(look(folder) or folder / NAME)


def here() -> str:
    """The registry of the folder that this process is in. Raises `AdapterError` when there is none, `ConfigError` on a broken file."""
    found = look(Path())
    if found is None:
        tried = " nor ".join(map(str, _candidates(Path())))
        raise AdapterError(
            f"no registry here: neither {tried} is there; give --registry FOLDER or grpc://HOST:PORT, or set FEDPEFT_REGISTRY"
        )
    return str(found)


def _candidates(folder: Path) -> list[Path]:
    """Beside jobs, and where each federation's file puts it."""
    files = [folder / name for name in FEDERATIONS if (folder / name).is_file()]
    return [folder / NAME, *(_of(file) for file in files or [folder / FEDERATIONS[0]])]


def _of(file: Path) -> Path:
    table = read_toml(file) if file.is_file() else {}
    given = table.get("registry") or Path(str(table.get("state", "state"))) / NAME
    return file.parent / Path(str(given)).expanduser()


@dataclass(frozen=True)
class Place:
    """A folder, or ``grpc://HOST:PORT`` with the ``identity`` to show there (`Identity.beside`); absent: ``$FEDPEFT_IDENTITY``.

    Without ``given`` it is the registry of the folder that this process is in, looked for when it is wanted (`here`).
    """

    given: str = ""
    identity: Path | None = None

    @cached_property
    def root(self) -> str:
        """The folder or the address. Raises as `here`."""
        return self.given or here()

    def __str__(self) -> str:
        return self.root

    @property
    def is_far(self) -> bool:
        """Whether it is a control plane's address."""
        from fedpeft.control.address import is_address

        return is_address(self.root)

    def open(self) -> Library:
        """The registry, here or far. Raises as `near` and `far` do."""
        return self.far() if self.is_far else self.near()

    def near(self) -> Registry:
        """The registry in this folder. Raises `AdapterError` when it is not there, or far away."""
        from fedpeft.registry import Registry

        if not Path(self.root).is_dir():
            raise AdapterError(
                f"{self.root}: no registry there; give --registry or set FEDPEFT_REGISTRY (a federation keeps it in its state folder)"
            )
        return Registry(Path(self.root))

    def far(self) -> RemoteRegistry:
        """The registry behind this address, with this user's cache. Raises `ConfigError`."""
        from fedpeft.control.cache import Cache, home
        from fedpeft.control.client import RemoteRegistry

        return RemoteRegistry(self.link(), Cache(home()))

    def watch(self, tasks: tuple[str, ...] = (), from_start: bool = False) -> Iterator[Change]:
        """Events and moves of aliases of ``tasks`` (none named: all) as they happen, for ever. Raises as `open` does."""
        from fedpeft.control.changes import follow

        return self.far().watch(tasks, from_start) if self.is_far else follow(self.near(), tasks, from_start)

    def link(self) -> Link:
        """The connection to this address. Raises `ConfigError` when it is a folder, or cannot be read."""
        from fedpeft.control.address import Address, Identity
        from fedpeft.control.link import Link

        if not self.is_far:
            raise ConfigError(f"{self.root}: is a folder; give grpc://HOST:PORT of a `fedpeft coordinator serve` on it")
        shown = self.identity or os.environ.get("FEDPEFT_IDENTITY")
        return Link(Address.parse(self.root), Identity.beside(Path(shown)) if shown else None)
