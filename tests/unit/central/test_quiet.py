"""The verbs of central jobs quieten the libraries before they import them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.bases import quiet
from fedpeft.central.world import World
from fedpeft.cli import central
from fedpeft.cli.central import Asked


class Hushed(Exception):
    pass


@pytest.mark.parametrize(
    "verb",
    [
        lambda: central.export(Path("job.toml")),
        lambda: Asked(Path("job.toml")).rank(World()),
        lambda: Asked(Path("job.toml"), verb="transfer").rank(World()),
    ],
    ids=["export", "rank", "transfer"],
)
def test_libraries_are_hushed_before_a_job_imports_them(monkeypatch: pytest.MonkeyPatch, verb: Callable[[], object]) -> None:
    def hush() -> None:
        raise Hushed

    monkeypatch.setattr(quiet, "hush", hush)
    for module in ("job", "transfer", "progress"):
        monkeypatch.setitem(sys.modules, f"fedpeft.central.{module}", None)  # whoever imports it first fails
    monkeypatch.setattr("fedpeft.processes.mortal", lambda: None)
    with pytest.raises(Hushed):
        verb()
