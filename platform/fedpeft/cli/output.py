"""Printing: rich tables for people, JSON lines for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FEW = 16
"""A list of more numbers than these is not read by people."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    kept = [list(row) for row in rows]
    sheet = Table(title=title, title_justify="left", header_style="bold")
    for place, column in enumerate(columns):
        numeric = bool(kept) and all(isinstance(row[place], int | float) for row in kept)
        sheet.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in kept:
        sheet.add_row(*(cell(value) for value in row))
    Console().print(sheet)


def listing(columns: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Print rows under headings, columns aligned, one line a row whatever the screen's width."""
    rows = [row for group in groups.values() for row in group]
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    lines = [("  ", columns)]
    for heading, group in groups.items():
        lines += [("", (heading,)), *(("  ", row) for row in group)]
    for indent, row in lines:
        cells = (text.rjust(width) if _number(text) else text.ljust(width) for text, width in zip(row, widths, strict=False))
        print((indent + "  ".join(cells)).rstrip())


def _number(text: str) -> bool:
    return text[:1].isdigit()


def cell(value: Any) -> str:
    """One value as text: floats with three decimals, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def emit(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def brief(value: Any) -> Any:
    """``value`` with every long list of numbers replaced by its length, for people."""
    if isinstance(value, Mapping):
        return {key: brief(item) for key, item in value.items()}
    if isinstance(value, list) and len(value) > FEW and all(isinstance(item, int | float) for item in value):
        return f"{len(value)} numbers"
    return [brief(item) for item in value] if isinstance(value, list) else value


def line(value: Mapping[str, Any]) -> str:
    """``value`` as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def size(count: float) -> str:
    """A byte count for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
