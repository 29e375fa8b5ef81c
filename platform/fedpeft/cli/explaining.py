"""What a plug-in says of itself: its paper, what it does, its settings."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any


def explain(what: str, name: str, table: Mapping[str, Any]) -> None:
    """Print all about entry ``name`` of ``table``, whose entries are each a ``what``. Raises `ConfigError` when there is none."""
    from fedpeft.errors import ConfigError

    if name not in table:
        raise ConfigError(f"{what}: {name!r} is not known; choose one of {sorted(table)}")
    made = table[name]
    page = (sys.modules[made.__module__].__doc__ or f"{made.__name__} of {made.__module__}").strip()
    print(f"{name}: {page.splitlines()[0]}\n")
    print(inspect.cleandoc(made.__doc__ or ""))
    print(f"\nsettings: {', '.join(f'{field.name} = {_default(field)}' for field in dataclasses.fields(made) if field.init) or 'none'}")


def _default(field: dataclasses.Field[Any]) -> str:
    return repr(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
