"""A train/test split that every site computes alike: by hash of the row, so equal rows never lie on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from heapq import nsmallest
from typing import Any

TEST_SHARE = 0.2
ALIASES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "validation", "valid", "val", "dev", "eval"),
}
"""What a split may be called in a file, best first."""


def split_of(key: str) -> str:
    """``train`` or ``test`` (a fifth) by SHA-256 of ``key``.

    >>> [split_of(f"row {number}") for number in range(4)]
    ['train', 'train', 'test', 'train']
    """
    return "test" if position(key) < TEST_SHARE else "train"


def position(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2.0**48


def lowest(rows: Iterable[Mapping[str, Any]], count: int) -> list[int]:
    """Numbers of the ``count`` of ``rows`` whose keys lie lowest, from there on: the same on every machine, and spread over the file."""
    return [number for _, number in nsmallest(count, ((position(row_key(row)), number) for number, row in enumerate(rows)))]


def row_key(row: Mapping[str, Any]) -> str:
    """The row as canonical JSON, its split left out."""
    return json.dumps({key: row[key] for key in sorted(row) if key != "split"}, default=str, ensure_ascii=False)
