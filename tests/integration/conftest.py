"""Fixtures and order of the tests with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

FIRST = ("test_chaos", "test_central", "test_masked_rounds")
"""Files that take longest, first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; else as they were collected."""
    here, places = Path(__file__).parent, {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)) if item.path.parent == here else len(FIRST))
