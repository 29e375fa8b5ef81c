"""The demo: a whole federation on one machine, from the same commands and files that a user has."""

from __future__ import annotations

from pathlib import Path


def run(folder: Path, rounds: int, fresh: bool) -> None:
    """Run the federation of `fedpeft.demo.setting` in ``folder``, compare it, and print the report.

    Raises:
        FedpeftError: what stopped it; ``folder`` keeps every log.
    """
    from fedpeft.demo.driver import drive

    drive(folder, rounds, fresh)


def run_private(folder: Path, rounds: int, fresh: bool) -> None:
    """Run the federations of `fedpeft.demo.private` in ``folder``, one after the other, and print what privacy costs.

    Raises:
        FedpeftError: what stopped one; ``folder`` keeps every log.
    """
    from fedpeft.demo.private import drive

    drive(folder, rounds, fresh)
