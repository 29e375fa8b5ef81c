"""A child process: started, watched, started again when it dies, ended with us."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.processes import FLAG

Tell = Callable[..., None]


@dataclass
class Child:
    """``command``, called ``name`` in events, with ``log`` for what it prints and ``env`` beside ours; ``tell`` hears of every start."""

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str]
    tell: Tell = lambda *_a, **_k: None
    _process: subprocess.Popen[bytes] | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Start it and the thread that starts it again."""
        self._spawn()
        threading.Thread(target=self._watch, name=f"{self.name}-watch", daemon=True).start()

    def stop(self) -> None:
        """End it, by force after 5 s."""
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None:
            _end(process)

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        return self._stopping.is_set()

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return None if self._process is None else self._process.pid

    def _spawn(self) -> None:
        env = {**os.environ, **self.env, FLAG: "1"}
        with self._lock, self.log.open("ab") as log:
            if not self._stopping.is_set():
                self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env)
                self.tell(self.name, reason=f"started as process {self._process.pid}", pid=self._process.pid)

    def _watch(self) -> None:
        pause, since = 0.2, time.monotonic()
        while not self._stopping.wait(0.2):
            if self._process is None or self._process.poll() is None:
                continue
            self.tell(self.name, reason=f"process {self._process.pid} ended with code {self._process.returncode}; starting it again")
            pause = 0.2 if time.monotonic() - since > 60.0 else min(pause * 2, 10.0)
            if self._stopping.wait(pause):
                return
            since = time.monotonic()
            _end(self._process)
            self._spawn()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End ``process`` and close our end of its lifeline."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
