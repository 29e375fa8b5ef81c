"""The fake federation of fake.py, as a fixture (it also runs in processes that know no tests)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_disk_waits() -> Iterator[None]:
    """Crashes here are exceptions, not power cuts: leave out the waits for the disk (subprocesses keep them)."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def relax(connection: object, _record: object) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous=OFF")  # type: ignore[attr-defined]

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda _handle: None)
    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)
    patch.undo()


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    name = "fedpeft_fake_federation"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("fake.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
