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
