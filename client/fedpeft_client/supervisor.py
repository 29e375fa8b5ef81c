"""Keeps a site's processes alive: starts them, restarts what dies with growing pauses, ends what hangs, stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from fedpeft import errors
from fedpeft.errors import FedpeftError, StorageError
from fedpeft.files import write_atomic
from fedpeft.processes import FLAG

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STEADY_AFTER = 60.0
GRACE_SECONDS = 8.0
LOG_LIMIT_BYTES = 8_000_000
FAULTS: dict[int, type[FedpeftError]] = {code: getattr(errors, name) for name, code in errors.EXIT_CODES.items()}


@dataclass(frozen=True)
class Child:
    """A process to keep alive.

    ``hung`` says, given its process id, why it must be ended now, or None. ``fells`` names the children that a process of this
    one, dead, leaves in a state that only their own restart cures. ``fatal`` are exit codes (see `fedpeft.errors`) that no
    restart cures: the last line of the child's log is then raised as that error. ``explain`` says by its log why it ended, if it can.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    hung: Callable[[int], str | None] = lambda _: None
    fells: Callable[[int], tuple[str, ...]] = lambda _: ()
    fatal: frozenset[int] = frozenset()
    explain: Callable[[Path], str] = lambda _: ""


@dataclass
class Running:
    """A child's current process and history; ``due`` is the monotonic time of the next start, ``verdict`` the watchdog's."""

    child: Child
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    failures: int = 0
    restarts: int = 0
    last_end: str = ""
    verdict: str = ""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self.process is None else self.process.pid


@dataclass
class Supervisor:
    """Runs ``children`` until `stop`; ``state_file`` shows what runs (JSON, rewritten on every change)."""

    children: tuple[Child, ...]
    state_file: Path
    tick: float = 0.2
    running: list[Running] = field(init=False)
    _stop: Event = field(default_factory=Event)
    _by: int = 0

    def __post_init__(self) -> None:
        self.running = [Running(child) for child in self.children]

    def run(self, on_tick: Callable[[list[Running]], None] = lambda _: None) -> int:
        """Supervise until `stop` is called; then end the children. ``on_tick`` is called about five times a second.

        Returns the number of the signal that called it first; 0 where none did.

        Raises:
            FedpeftError: a child ended with one of its fatal exit codes; the kind is that of the code.
        """
        try:
            while not self._stop.is_set():
                if any([self._step(one) for one in self.running]):
                    self._write()
                on_tick(self.running)
                self._stop.wait(self.tick)
        finally:
            _end([one for one in self.running if one.process is not None])
            self._write()
        return self._by

    def stop(self, number: int = 0, _frame: object = None) -> None:
        """Ask `run` to end; a signal handler."""
        self._by = self._by or number
        self._stop.set()

    def _step(self, one: Running) -> bool:
        """Look at one child once; return whether anything changed."""
        now = time.monotonic()
        if one.process is None:
            return now >= one.due and _start(one, now)
        code = one.process.poll()
        if code is None:
            return _check_hung(one)
        felled = one.child.fells(one.process.pid)
        _bury(one, now, one.verdict or one.child.explain(one.child.log) or f"ended with {_ending(code)}")
        if code in one.child.fatal:
            raise FAULTS[code](_last_line(one.child.log))
        for other in self.running:
            if other.child.name in felled and other.process is not None:
                _end([other], f"restarted: {one.child.name} died in the middle of its work")
        return True

    def _write(self) -> None:
        rows = [{"name": r.child.name, "pid": r.pid, "restarts": r.restarts, "last_end": r.last_end} for r in self.running]
        with suppress(StorageError):  # a full disk must not end the site
            write_atomic(self.state_file, json.dumps({"supervisor": os.getpid(), "children": rows}, indent=1).encode())


def _start(one: Running, now: float) -> bool:
    sink = _sink(one.child.log)
    try:
        one.process = subprocess.Popen(
            one.child.command,
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**one.child.environment, FLAG: "1"},
            start_new_session=True,
        )
    finally:
        os.close(sink)
    one.started, one.verdict = now, ""
    return True


def _sink(log: Path) -> int:
    """The child's log, turned over when it is long; nowhere when the disk refuses."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _check_hung(one: Running) -> bool:
    assert one.process is not None
    reason = one.child.hung(one.process.pid)
    if reason is not None:
        one.verdict = f"ended by the watchdog: {reason}"
        one.process.kill()
        one.process.wait()
    return False


def _bury(one: Running, now: float, why: str) -> None:
    assert one.process is not None
    if one.process.stdin is not None:
        with suppress(OSError):
            one.process.stdin.close()
    one.failures = 1 if now - one.started > STEADY_AFTER else one.failures + 1
    one.process, one.last_end, one.restarts = None, why, one.restarts + 1
    one.due = now + min(FIRST_PAUSE * 2.0 ** (one.failures - 1), LONGEST_PAUSE)


def _end(alive: list[Running], why: str = "stopped") -> None:
    """End the processes: ask all, wait together, then insist."""
    processes = [one.process for one in alive if one.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
    for one in alive:
        one.process, one.last_end, one.restarts, one.due = None, why, one.restarts + 1, 0.0


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]
    said = [line.removeprefix("fedpeft: ") for line in lines if line.startswith("fedpeft: ")]
    return said[-1] if said else f"ended without a word; {log} may say more"


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
