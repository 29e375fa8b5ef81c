"""Which settings are compared: ``key=value,value`` of the command line, every combination of them, each with every seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedpeft.config import override
from fedpeft.errors import ConfigError

OPENING, CLOSING, QUOTES = "[{(", "]})", "\"'"
BASE = "base."
"""Keys that sites must have as the federation has them."""


@dataclass(frozen=True)
class Cell:
    """One combination of settings, in TOML form by key, and one seed."""

    settings: Mapping[str, str]
    seed: int

    @property
    def said(self) -> str:
        """It in one line."""
        return " ".join([*(f"{key}={value}" for key, value in self.settings.items()), f"seed={self.seed}"])

    def applied(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """A federation's ``table`` with these settings.

        The name of a kind alone keeps what the table says of it where that is its kind already. Raises `ConfigError`.
        """
        made = deepcopy(dict(table)) | {"seed": self.seed}
        for key, text in self.settings.items():
            if not _kept(made, key, text):
                override(made, key, text)
        return made

    def held(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """A site's ``table`` with those of these settings that sites must share: the base's. Raises `ConfigError`."""
        made = deepcopy(dict(table))
        for key, text in self.settings.items():
            if key.startswith(BASE):
                override(made, key, text)
        return made


def varied(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Values by key of ``key=value,value`` texts.

    Raises:
        ConfigError: a text has no key or a value is empty, or a key is there twice, or is the seed.

    >>> varied(["scheme.kind=fedavg,ffa", "method={kind='lora',r=4},ia3"])
    {'scheme.kind': ['fedavg', 'ffa'], 'method': ["{kind='lora',r=4}", 'ia3']}
    """
    found: dict[str, list[str]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        values = list(parts(text))
        if not equals or not key.strip() or not all(values):
            raise ConfigError(f"--set {pair}: needs the form key=value,value, for example scheme.kind=alternating,fedavg")
        if key in found:
            raise ConfigError(f"--set {pair}: {key} is there twice; give all its values in one: {key}={','.join([*found[key], *values])}")
        if key == "seed":
            raise ConfigError(f"--set {pair}: seeds are repetitions, not settings; --seeds N takes N of them, from the file's on")
        found[key] = list(dict.fromkeys(values))
    return found


def cells(settings: Mapping[str, Sequence[str]], first: int, seeds: int) -> list[Cell]:
    """Every combination of ``settings`` with ``seeds`` seeds from ``first`` on; a combination's seeds are neighbours."""
    chosen = [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
    return [Cell(one, seed) for one in chosen for seed in range(first, first + seeds)]


def parts(text: str) -> Iterator[str]:
    """``text`` at its commas, but for those in brackets and quotes."""
    depth, quote, part = 0, "", ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in QUOTES:
            quote = sign
        depth += (sign in OPENING) - (sign in CLOSING) if not quote else 0
        if sign == "," and not depth and not quote:
            yield part.strip()
            part = ""
        else:
            part += sign
    yield part.strip()


def _kept(table: Mapping[str, Any], key: str, text: str) -> bool:
    for parent in key.split("."):
        table = table.get(parent, {}) if isinstance(table, Mapping) else {}
    return isinstance(table, Mapping) and table.get("kind") == text
