"""Child processes: each with its log, all ended when this process ends, and their faults raised here under their own exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import FedpeftError, kind_of
from fedpeft.processes import FLAG, last_words

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Child:
    """A running process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def start(name: str, arguments: list[str], log: Path, threads: int = 1) -> Child:
    """Start ``python -m ...`` with so many compute threads and its output after what ``log`` holds; it ends when this process does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        FLAG: "1",
    }
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, stdout=out, stderr=out, env=env, start_new_session=True
        )
    return Child(name, process, log)


@contextmanager
def ended(children: list[Child]) -> Iterator[list[Child]]:
    """End every child on the way out: politely first, then for good."""
    try:
        yield children
    finally:
        running = [child.process for child in children if child.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in children:
            assert child.process.stdin is not None
            child.process.stdin.close()


def check(child: Child) -> None:
    """Raise what ``child`` says it ended with, unless it ended well. Raises `FedpeftError`."""
    code, said = child.process.returncode, f"{last_words(child.log).removeprefix('fedpeft: ')} (log: {child.log})"
    if code < 0:
        raise FedpeftError(f"{child.name} was ended by signal {-code}, as systems do that lack memory; its last words: {said}")
    if code:
        raise (kind_of(code) or FedpeftError)(f"{child.name} ended with exit code {code}: {said}")


def lines(child: Child, done: int = 0) -> Iterator[str]:
    """What ``child`` writes after the first ``done`` bytes of its log, line by line as it comes, until it ends; ends it on the way out.

    Raises:
        FedpeftError: it did not end well (`check`).
    """
    with ended([child]):
        alive = True
        while alive:
            alive = child.process.poll() is None
            fresh = added(child.log, done)
            yield from fresh.decode(errors="replace").splitlines()
            done += len(fresh)
            time.sleep(POLL_SECONDS if alive else 0.0)
    check(child)


def added(path: Path, offset: int) -> bytes:
    """The whole lines that were written to ``path`` after its first ``offset`` bytes."""
    if not path.exists():
        return b""
    with path.open("rb") as stream:
        stream.seek(offset)
        whole, newline, _torn = stream.read().rpartition(b"\n")
    return whole + newline
