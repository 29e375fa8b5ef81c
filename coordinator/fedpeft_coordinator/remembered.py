"""What a base was once found to say, kept in the user's cache folder for the next start.

An answer is a function of its question's ``matter`` (which holds the digests of the base's files) and of the code that gave it. So it
counts only while the same packages are installed in the same places and no source file that its process had loaded has changed since:
fedpeft's own, transformers', a plug-in's. Whatever cannot be read, written or believed is asked anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpeft.control.cache import home
from fedpeft.errors import StorageError
from fedpeft.files import write_atomic

MOST = 64
"""Answers kept; those written first leave."""
SOURCES = "sources"
"""Under this key an answer names the files that its process had loaded."""


def answer(matter: dict[str, Any], ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``ask`` answers, or answered when all that it depends on was as it is now. Raises what ``ask`` raises."""
    try:
        path = home() / "layouts" / f"{_digest(matter, sys.version, _places(), _installed())}.json"
    except (RuntimeError, OSError):  # a user without a home, as containers have, or a folder of modules that cannot be listed
        return _bare(ask())[0]
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["state"] == state(kept[SOURCES]):
            return dict(kept["answer"])
    found, sources = _bare(ask())
    kept = {"answer": found, "state": state(sources), SOURCES: sources}
    with suppress(StorageError, OSError):
        write_atomic(path, json.dumps(kept).encode(), 0o600)
        for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-MOST]:
            old.unlink()
    return found


def _bare(answered: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    return {key: value for key, value in answered.items() if key != SOURCES}, answered[SOURCES]


def loaded() -> list[str]:
    """The files of all modules that this process has loaded; some that torch makes up have none."""
    named = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
    return sorted(file for file in named if Path(file).is_absolute() and Path(file).is_file())


def state(files: Iterable[str]) -> str:
    """A digest over size and time of change of ``files``. Raises `OSError` when one is not there."""
    return _digest([(file, (now := os.stat(file)).st_size, now.st_mtime_ns) for file in files])


def _installed() -> list[list[str]]:
    """What is installed, by its name and version, place by place."""
    return [sorted(name for name in os.listdir(place) if name.endswith("-info")) for place in _places() if Path(place).is_dir()]


def _places() -> list[str]:
    """Where modules come from; the script's folder or the current one is none of them, as for the process that is asked (``-P``)."""
    return sys.path if sys.flags.safe_path else sys.path[1:]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
