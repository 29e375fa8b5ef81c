"""``--set a.b=value``: settings that the command line changes."""

from __future__ import annotations

from typing import Any


def table(pairs: list[str] | None) -> dict[str, Any]:
    """Values by key. Raises `ConfigError` when a pair has no equals sign."""
    from fedpeft.errors import ConfigError

    wrong = [pair for pair in pairs or [] if "=" not in pair]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: needs the form a.b=value, for example training.steps=50")
    return dict(pair.split("=", 1) for pair in pairs or [])
