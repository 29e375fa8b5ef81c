"""How large a message and its fields may be; what is larger is refused before anything is done with it."""

from __future__ import annotations

from math import isfinite
from typing import Any

from fedpeft.errors import AdapterError

MESSAGE = 4 << 20
"""Bytes of one message, either way."""
CHUNK = 1 << 20
"""Bytes of a chunk's data: large enough that calls cost little, small enough that a slow reader holds little memory."""
PAGE = 2 << 20
"""Bytes of versions in one answer; a version's manifest is smaller."""
TEXTS = {
    "task": 100,
    "ref": 256,
    "digest": 64,
    "etag": 64,
    "alias": 32,
    "origin": 256,
    "page_token": 200,
    "text": 1 << 17,
    "name": 255,
    "router": 32,
    "encoder": 512,
}
"""Characters by field name; a text that is not here may have none."""
BYTES = {"manifest": 1 << 20, "signature": 512, "data": CHUNK}
LISTS = {"files": 16, "tasks": 1000, "seen": 1000, "values": 1 << 16}


def check(message: Any) -> None:
    """Raise `AdapterError` when a field of ``message``, or of a message in it, is larger than its bound or no number."""
    for field, value in message.ListFields():
        many = field.is_repeated
        if many and len(value) > LISTS.get(field.name, 0):
            raise _fault(field.name, len(value), LISTS.get(field.name, 0), "entries")
        if many and field.message_type and field.message_type.GetOptions().map_entry:
            _check_map(field.name, value)
        else:
            for item in value if many else (value,):
                _check_value(field.name, item)


def _check_map(name: str, table: Any) -> None:
    for key, value in table.items():
        _check_value("task", key)
        _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, str):
        name = "task" if name == "tasks" else name
        if len(value) > TEXTS.get(name, 0):
            raise _fault(name, len(value), TEXTS.get(name, 0), "characters")
    elif isinstance(value, bytes):
        if len(value) > BYTES.get(name, 0):
            raise _fault(name, len(value), BYTES.get(name, 0), "bytes")
    elif isinstance(value, float):
        if not isfinite(value):
            raise AdapterError(f"request: {name} holds {value}; it takes finite numbers")
    elif hasattr(value, "ListFields"):
        check(value)


def _fault(name: str, seen: int, most: int, unit: str) -> AdapterError:
    return AdapterError(f"request: {name} has {seen} {unit}; at most {most} are taken")
