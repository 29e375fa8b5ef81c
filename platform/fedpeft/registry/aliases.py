"""Aliases (``prod``, ``canary``): names that point at a version of a task, moved by signed, hash-chained lines of a history."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedpeft.errors import AdapterError, StorageError
from fedpeft.registry.log import DIGEST, START, now
from fedpeft.registry.manifest import sha256
from fedpeft.signing import Keys

ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
LATEST = "latest"
"""Not an alias but the youngest event of the task."""


@dataclass(frozen=True)
class Move:
    """From now on ``alias`` of ``task`` is version ``digest``; ``by`` says who asked, ``signature`` is the registry's."""

    number: int
    task: str
    alias: str
    digest: str
    by: str
    created: str
    previous: str = START
    signature: str = ""

    @property
    def body(self) -> bytes:
        """What is signed: the move and the hash of the one before."""
        return json.dumps({**asdict(self), "signature": ""}, sort_keys=True, separators=(",", ":")).encode()

    @property
    def hash(self) -> str:
        """SHA-256 of the body."""
        return sha256(self.body)

    def to_line(self) -> bytes:
        """What a history holds; `parse` reads it back."""
        return json.dumps(asdict(self), sort_keys=True).encode()


def parse(lines: Sequence[bytes], task: str, where: str) -> tuple[Move, ...]:
    """The moves of ``task``, oldest first; signatures are checked where one is followed.

    Raises:
        StorageError: a line is malformed, of another task, or breaks the chain; ``where`` and the line are named.
    """
    moves: list[Move] = []
    for line in lines:
        move, before = _parse(line), moves[-1].hash if moves else START
        if move is None or (move.previous, move.number, move.task) != (before, len(moves) + 1, task):
            raise StorageError(f"{where}: line {len(moves) + 1} was changed or is out of order; restore the file from a backup")
        moves.append(move)
    return tuple(moves)


def follow(moves: Sequence[Move], move: tuple[str, str, str, str], keys: Keys) -> Move:
    """The signed move that comes after ``moves``; ``move`` is task, alias, digest, by. Raises `StorageError`."""
    bare = Move(len(moves) + 1, *move, now(), moves[-1].hash if moves else START)
    return Move(**{**asdict(bare), "signature": keys.sign(bare.body).decode()})


def check_name(alias: str) -> None:
    """Raise `AdapterError` when ``alias`` cannot be one."""
    if alias == LATEST or not ALIAS.fullmatch(alias):
        raise AdapterError(
            f"alias {alias!r}: cannot be set; a name has 1 to 32 of a-z, 0-9, _ and -, begins with a letter and is not {LATEST!r}"
        )


def _parse(line: bytes) -> Move | None:
    try:
        table: dict[str, Any] = json.loads(line)
        move = Move(**table)
        texts = [getattr(move, item.name) for item in fields(Move) if item.name != "number"]
        whole = all(isinstance(text, str) for text in texts) and DIGEST.fullmatch(move.digest) and ALIAS.fullmatch(move.alias)
    except (ValueError, TypeError, RecursionError):
        return None
    return move if whole and isinstance(move.number, int) else None
