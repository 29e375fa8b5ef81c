"""Garbled messages for the fuzz tests, a bound on the memory that reading them takes, and real processes to kill."""

from __future__ import annotations

import copy
import os
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from hypothesis import strategies as st

HUGE = [2**31, 2**63, 2**64, -(2**63), 10**30, 0, -1]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(HUGE),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\0", "../..", "é"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5
)


def places(table: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(table) if isinstance(table, dict) else list(range(len(table))) if isinstance(table, list) else []
    return [path, *(found for key in keys for found in places(table[key], (*path, key)))]


@st.composite
def garbled_tables(draw: Any, table: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """``table`` with one part of it replaced, dropped or added."""
    out = copy.deepcopy(table)
    path = draw(st.sampled_from(places(table)))
    if not path:
        return draw(values)
    parent = out
    for key in path[:-1]:
        parent = parent[key]
    kind = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
    if kind == "drop":
        del parent[path[-1]]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=6))] = draw(values)
    else:
        parent[path[-1]] = draw(values)
    return out


@st.composite
def garbled_bytes(draw: Any, data: bytes) -> bytes:
    """``data`` cut, lengthened or with a few bytes changed."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(out) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and out:
            out[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del out[place : place + draw(st.integers(1, 16))]
        elif kind == "insert":
            out[place:place] = draw(st.binary(max_size=16))
        else:
            out[place:place] = out[place : place + 8]
    return bytes(out)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fail when more than ``limit`` bytes are held at once inside; numpy's buffers count even before they are touched."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit, "reading took more memory than the message can justify"
    finally:
        tracemalloc.stop()


Say = Callable[..., object]


class Child:
    """A fork of this process that runs ``work`` and ends without any clean-up; ``said`` has what it says, line by line."""

    def __init__(self, work: Callable[[Say], None]) -> None:
        mine, its = os.pipe()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of threads, which a fork leaves behind
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                work(lambda *words: os.write(its, (" ".join(map(str, words)) + "\n").encode()))
                code = 0
            finally:
                os._exit(code)
        os.close(its)
        self.said = os.fdopen(mine)

    def end(self, kill: bool = False) -> tuple[list[str], int]:
        """Its last lines and its exit code, minus 9 when it was killed."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        with self.said:
            lines = self.said.read().split("\n")[:-1]
        return lines, os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="session")
def forked() -> type[Child]:
    return Child


@pytest.fixture(scope="session")
def tables() -> Callable[..., st.SearchStrategy[Any]]:
    return garbled_tables


@pytest.fixture(scope="session")
def spoilt() -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return garbled_bytes


@pytest.fixture(scope="session")
def bounded() -> Callable[[int], AbstractContextManager[None]]:
    return memory_below
