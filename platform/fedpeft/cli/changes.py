"""``--set a.b=value``: settings that the command line changes."""

from __future__ import annotations

from typing import Any


def table(pairs: list[str] | None, example: str = "training.steps=50") -> dict[str, str]:
    """Texts by key. Raises `ConfigError` when a pair has no equals sign, or nothing before it."""
    from fedpeft.errors import ConfigError

    wrong = [pair for pair in pairs or [] if "=" not in pair or pair.startswith("=")]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: needs the form key=value, for example {example}")
    return dict(pair.split("=", 1) for pair in pairs or [])


def values(pairs: list[str] | None, example: str) -> dict[str, Any]:
    """TOML values by key, tables for dotted keys; what is no TOML, such as a path without quotes, is the text itself. Raises as `table`."""
    from fedpeft.config import override

    found: dict[str, Any] = {}
    for key, text in table(pairs, example).items():
        override(found, key, text)
    return found
