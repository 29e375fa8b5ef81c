"""Child processes: each with its log, all ended when this process ends, and their faults raised here under their own exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import FedpeftError, kind_of
from fedpeft.processes import FLAG, last_words

GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Child:
    """A running process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def start(name: str, arguments: list[str], log: Path) -> Child:
    """Start ``python -m ...`` with one compute thread and its output in ``log``; it ends when this process does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
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
    code = child.process.returncode
    if code:
        raise (kind_of(code) or FedpeftError)(f"{child.name} ended with exit code {code}: {last_words(child.log)} (log: {child.log})")


def finished(child: Child) -> None:
    """Wait until ``child`` ends. Raises `FedpeftError` as `check`."""
    with ended([child]):
        child.process.wait()
    check(child)
