"""Where something listens: an address, and TLS wherever others can reach it."""

from __future__ import annotations

from pathlib import Path

from fedpeft.config import Section
from fedpeft.control.address import loopback
from fedpeft.errors import ConfigError


class Tls(Section):
    """PEM files of a public listener; ``ca`` is what those who connect are given."""

    ca: Path
    cert: Path
    key: Path


def guarded(name: str, host: str, tls: Tls | None, insecure: bool) -> None:
    """Raise `ValueError` when table ``name`` would listen beyond loopback without TLS and without saying that this is wanted."""
    if tls is None and not insecure and not loopback(host):
        raise ValueError(
            f"{name}.host = {host!r} is reachable from outside and [{name}.tls] is missing; "
            f"make certificates with `fedpeft certificates`, or accept the risk with {name}.insecure = true"
        )


def rooted(tls: Tls | None, folder: Path, name: str) -> Tls | None:
    """Paths relative to ``folder`` made whole. Raises `ConfigError` when a file does not exist; ``name`` says whose it is."""
    found = None if tls is None else Tls(**{key: folder / path.expanduser() for key, path in tls})
    for key, path in found or ():
        if not path.is_file():
            raise ConfigError(f"{name}.{key}: {path} does not exist; `fedpeft certificates` makes the files")
    return found
