"""The control plane's process: ``python -m fedpeft_coordinator.control.process SETTINGS.json``, or in the foreground."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from fedpeft_coordinator.control.opening import opened
from fedpeft_coordinator.control.settings import Settings
from fedpeft_coordinator.events import Events


def run(settings: Settings, told: Callable[[int], None]) -> int:
    """Serve until SIGTERM or SIGINT, whose number is returned; ``told`` hears the port.

    Raises:
        LinkError, ConfigError, PolicyError, StorageError: it cannot begin.
    """
    from fedpeft_coordinator.control.serve import Server

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    record = Events(settings.state / "calls.jsonl")
    with opened(settings.registry, settings.control) as registry:
        return asyncio.run(Server(registry, settings.control, settings.state, settings.federation, record=record).run(told))


def main() -> int:
    """Entry of the child: one argument, the path of a `Settings` file."""
    from fedpeft import plugins
    from fedpeft.errors import FedpeftError
    from fedpeft.processes import hold

    hold()
    try:
        plugins.load()
        run(Settings.read(Path(sys.argv[1])), lambda port: print(f"control plane on port {port}", flush=True))
    except FedpeftError as fault:
        print(fault, file=sys.stderr, flush=True)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
