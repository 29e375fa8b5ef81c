"""Where a registry is: a folder here, or a control plane far away. The one way in which verbs and servers open either."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedpeft.control.client import RemoteRegistry
    from fedpeft.control.link import Link
    from fedpeft.registry import Library, Registry
    from fedpeft.v1.registry_pb2 import Change


@dataclass(frozen=True)
class Place:
    """A folder, or ``grpc://HOST:PORT`` with the ``identity`` to show there (`Identity.beside`); absent: ``$FEDPEFT_IDENTITY``."""

    root: str
    identity: Path | None = None

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
