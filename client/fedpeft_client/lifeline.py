"""A child that dies with its parent: it holds the read end of a pipe whose write end only the parent has.

The kernel closes the parent's end however the parent ends (kill -9, a zombie without a reaper, an out-of-memory kill),
which watching a process id does not notice in all these cases.
"""

from __future__ import annotations

import os
import sys
import threading

FLAG = "FEDPEFT_LIFELINE"


def hold() -> None:
    """End this process when standard input ends, if the parent said so by setting ``FEDPEFT_LIFELINE``."""
    if os.environ.pop(FLAG, None):
        threading.Thread(target=_watch, args=(sys.stdin.fileno(),), name="lifeline", daemon=True).start()


def _watch(handle: int) -> None:
    while os.read(handle, 1):
        pass
    os._exit(0)
