"""Rows of a data set of the hub, class numbers turned into their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedpeft.bases.images import File
from fedpeft.errors import DataError
from fedpeft.tasks.protocol import Row


def hub_rows(name: str, config: str | None = None) -> list[Row]:
    """All rows of the data set ``name``, each with its split. Raises `DataError` when it cannot be loaded."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: hub data sets need the datasets library; pip install 'fedpeft[hub]', or give a local path") from None
    try:
        found = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as fault:
        cause = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise DataError(f"{name}: cannot be loaded from the hub: {cause}; check name, config and network, or give a path") from None
    return [{"split": split, **row} for split, part in found.items() for row in _plain(part, datasets.ClassLabel, datasets.Image)]


def _plain(part: Any, class_label: type[Any], image: type[Any]) -> Iterable[Row]:
    """Rows of one split of a hub data set, class numbers turned into their names, images as files."""
    named = {column: feature for column, feature in part.features.items() if isinstance(feature, class_label)}
    images = [column for column, feature in part.features.items() if isinstance(feature, image)]
    for column in images:
        part = part.cast_column(column, image(decode=False))  # the file, which is decoded within our bounds
    for row in part:
        labels = {column: feature.int2str(row[column]) for column, feature in named.items() if row[column] is not None}
        yield {**row, **labels, **{column: row[column]["bytes"] or File(row[column]["path"]) for column in images if row[column]}}
