"""Child processes: a free port for them, and a lifeline that ends them with their parent."""

from __future__ import annotations

import os
import socket
import sys
import threading

FLAG = "FEDPEFT_LIFELINE"
"""Environment variable by which a parent says that the child's standard input is a lifeline."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
