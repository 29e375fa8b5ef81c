"""What installed packages add to the tables, by entry points: nothing is ever loaded because another machine named it."""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedpeft.errors import ConfigError

TABLES = {
    "fedpeft.schemes": ("fedpeft.schemes", "SCHEMES"),
    "fedpeft.methods": ("fedpeft.methods", "METHODS"),
    "fedpeft.combines": ("fedpeft.schemes.robust", "COMBINES"),
}
"""The table that each group of entry points adds to."""


def load() -> None:
    """Add what is installed to the tables; every process does so once, at its start. Without plug-ins nothing is imported.

    Raises:
        ConfigError: a plug-in cannot be imported, has another ``kind`` than its entry point's name, takes a name that is there, or
            is a method without ``facts``.
    """
    for group, (home, name) in TABLES.items():
        for entry in entry_points(group=group):
            add(getattr(import_module(home), name), entry)


def add(table: MutableMapping[str, type[Any]], entry: EntryPoint) -> None:
    """Add one plug-in to ``table``; again is no fault. Raises `ConfigError` as `load`."""
    where = f"plug-in {entry.name!r} of {entry.dist.name if entry.dist else 'an installed package'} (entry point {entry.group})"
    try:
        kind = entry.load()
    except Exception as fault:
        raise ConfigError(f"{where}: cannot be imported: {type(fault).__name__}: {fault}; mend or uninstall the package") from fault
    if getattr(kind, "kind", None) != entry.name:
        raise ConfigError(f"{where}: the class's kind is {getattr(kind, 'kind', None)!r}; give class and entry point one name")
    if table.setdefault(entry.name, kind) is not kind:
        raise ConfigError(f"{where}: the name is taken; give class and entry point a new one")
    if entry.group == "fedpeft.methods":
        _facts(where, kind)


def _facts(where: str, method: type[Any]) -> None:
    from fedpeft.methods import SPECS, MethodSpec

    if not isinstance(getattr(method, "facts", None), MethodSpec):
        raise ConfigError(f"{where}: its class has no `facts: ClassVar[MethodSpec]`; say what it trains and how it averages there")
    SPECS[method.kind] = method.facts
