"""Flower's own SuperNode command in a process of ours that ends with its supervisor: `python -m fedpeft_client.supernode`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

from fedpeft.errors import LinkError
from fedpeft.processes import hold
from fedpeft_client.config import SiteConfig

FIRST_WORDS, UNKNOWN_KEY = b"Starting Flower SuperNode", b"[code: 2004]"
TAIL_BYTES = 16_384


def arguments(site: SiteConfig, port: int, secret: Path) -> list[str]:
    """The command line of the SuperNode: our process takes the tasks, at ``port`` of loopback, with ``secret``."""
    line = ["--superlink", site.coordinator, "--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--superexec-auth-secret-file", str(secret)]
    roots, key = site.tls.root_certificates, site.auth.key
    line += ["--insecure"] if roots is None else ["--root-certificates", str(roots)]
    return line if key is None else [*line, "--auth-supernode-private-key", str(key)]


def explained(site: SiteConfig, log: Path) -> str:
    """Why the SuperNode that wrote the end of ``log`` was turned away, or an empty string."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        last = file.read().rpartition(FIRST_WORDS)[2]
        if UNKNOWN_KEY in last:
            own = f"{site.auth.key.name} of this site" if site.auth.key else "a key of this site, which has none (auth.key)"
            return (
                f"the coordinator does not know {own}, or not yet: its link.node_keys must hold {site.name}.pub, with link.node_auth = true"
            )
    return ""


def command() -> Callable[[], object]:
    """The function behind the installed `flower-supernode` script. Raises `LinkError` when Flower is not installed."""
    found = list(entry_points(group="console_scripts", name="flower-supernode"))
    if not found:
        raise LinkError("flower-supernode is not installed; run: pip install 'fedpeft[client]'")
    return found[0].load()  # type: ignore[no-any-return]


def main() -> None:
    """Run Flower's SuperNode with this process's arguments until it, or the supervisor, ends."""
    hold()
    sys.argv[0] = "flower-supernode"
    command()()


if __name__ == "__main__":
    main()
