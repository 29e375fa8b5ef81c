"""Rows of .csv and .tsv files as spreadsheets write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.errors import DataError
from fedpeft.tasks.protocol import Row


def read_csv(path: Path) -> list[Row]:
    """Rows by the names of the header. Raises `DataError` that names the line."""
    text = path.read_text(encoding="utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: {_width(row)} fields, the header has {len(reader.fieldnames or ())}")
            rows.append(dict(row))
    except csv.Error as fault:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {fault}; quote fields that hold commas or line ends") from None
    return rows


def _delimiter(path: Path, text: str) -> str:
    """A tab in .tsv; else a comma, or what stands in its place where the header holds none: spreadsheets of many countries write ``;``."""
    header = text.split("\n", 1)[0]
    return "\t" if path.suffix.lower() == ".tsv" else next((sign for sign in (",", ";", "\t") if sign in header), ",")


def _width(row: Mapping[Any, Any]) -> int:
    return sum(len(value) if isinstance(value, list) else value is not None for value in row.values())
