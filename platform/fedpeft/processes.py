"""Processes: what ends them and how they answer it; for children a free port, the last line of their log, and a lifeline.

Whoever runs a process asks it to end by SIGTERM, who sits before it by SIGINT. A service (`client join`, `client serve`, `coordinator
serve`) has no other end than SIGTERM, after which it ends in order: exit code 0. All other verbs were not done then, and answer as to
SIGINT: 130.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

FLAG = "FEDPEFT_LIFELINE"
"""Environment variable by which a parent says that the child's standard input is a lifeline."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGTERM is an interrupt: what was begun is taken down as after SIGINT, children and files too."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def mortal() -> None:
    """Let SIGTERM end this process at once: who waits for other ranks in a library hears nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_service(number: int) -> None:
    """How a service answers that ended in order because of signal ``number``. Raises `KeyboardInterrupt` when it was SIGINT."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(log: Path) -> str:
    """The last line of a child's log that is not blank."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it says nothing")


def hold() -> None:
    """End this process when standard input ends, if the parent said so by setting ``FEDPEFT_LIFELINE``.

    The child holds the read end of a pipe whose write end only the parent has. The kernel closes the parent's end however
    the parent ends (kill -9, a zombie without a reaper, an out-of-memory kill), which watching a process id does not notice
    in all these cases.
    """
    if os.environ.pop(FLAG, None):
        threading.Thread(target=_watch, args=(sys.stdin.fileno(),), name="lifeline", daemon=True).start()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(handle: int) -> None:
    while os.read(handle, 1):
        pass
    os._exit(0)
