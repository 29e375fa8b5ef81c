"""Order and places of the tests with real processes, and the cache that they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FIRST = ("test_chaos", "masked", "central", "serve", "test_gates")
"""Files, and folders whose files share processes, that take longest: first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first, else as collected; the tests of a folder, and elsewhere those of a file, go to one worker (``--dist loadgroup``)."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(group(item.path), len(FIRST)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item.path)))


def group(path: Path) -> str:
    """What is run in one process: the folder below here, or the file."""
    if HERE not in path.parents:
        return str(path)
    inner = path.relative_to(HERE)
    return inner.stem if len(inner.parts) == 1 else inner.parts[0]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What processes keep in the user's cache lies with the tests' folders, for all workers together."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield
