"""Words for figures, the same in the table and in the plot."""

from __future__ import annotations

COLUMNS = {"local": "local only", "federated": "federated", "central": "central"}
"""What readers call the arms."""
ARMS = tuple(COLUMNS)


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units: 1,234,567 is 1.23 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{2 if value < 10 * scale else 1 if value < 100 * scale else 0}f} {unit}"
    return f"{value:.0f} B"
