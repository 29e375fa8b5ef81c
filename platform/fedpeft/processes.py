"""Child processes: a free port for them, the last line of their log, and a lifeline that ends them with their parent."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

FLAG = "FEDPEFT_LIFELINE"
"""Environment variable by which a parent says that the child's standard input is a lifeline."""


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


def _watch(handle: int) -> None:
    while os.read(handle, 1):
        pass
    os._exit(0)
