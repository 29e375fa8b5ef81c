"""The supervisor with real processes: restarts what dies, ends what hangs, leaves nobody behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpeft.errors import BaseError
from fedpeft_client import status
from fedpeft_client.supervisor import Child, Running, Supervisor

pytestmark = pytest.mark.integration

SLEEPER = "from fedpeft.processes import hold; import time; hold(); time.sleep(60)"


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child(tmp_path: Path, code: str, name: str = "sleeper", **settings) -> Child:
    return Child(name, (sys.executable, "-c", code), dict(os.environ), tmp_path / f"{name}.log", **settings)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    started: list[tuple[Supervisor, threading.Thread]] = []

    def start(*children: Child) -> Supervisor:
        supervisor = Supervisor(children, tmp_path / "supervisor.json", tick=0.02)
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        started.append((supervisor, thread))
        return supervisor

    yield start
    for supervisor, thread in started:
        supervisor.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_a_killed_child_is_started_again_and_stop_ends_it(tmp_path: Path, supervised) -> None:
    supervisor = supervised(child(tmp_path, SLEEPER))
    one: Running = supervisor.running[0]
    wait_for(lambda: one.pid)
    first = one.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: one.pid not in (None, first))
    second = one.pid
    assert one.restarts == 1
    wait_for(lambda: json.loads((tmp_path / "supervisor.json").read_text())["children"][0]["pid"] == second)
    supervisor.stop()
    wait_for(lambda: not alive(second))
    wait_for(lambda: json.loads((tmp_path / "supervisor.json").read_text())["children"][0]["last_end"] == "stopped")


def test_a_death_in_the_middle_of_work_restarts_the_partner_too(tmp_path: Path, supervised) -> None:
    pulse = tmp_path / "worker.json"
    code = (
        "from fedpeft_client.status import Pulse; from pathlib import Path; import time\n"
        f"pulse = Pulse(Path({str(pulse)!r})); pulse.progress('triage', 3); time.sleep(60)"
    )
    worker = child(tmp_path, code, "worker", fells=lambda pid: ("node",) if status.busy(pulse, pid) else ())
    node, working = supervised(child(tmp_path, SLEEPER, "node"), worker).running
    wait_for(lambda: pulse.exists() and status.busy(pulse, working.pid or 0))
    before = node.pid
    os.kill(working.pid, signal.SIGKILL)
    wait_for(lambda: node.pid not in (None, before))
    assert node.last_end == "restarted: worker died in the middle of its work"


def test_pauses_between_restarts_grow(tmp_path: Path, supervised) -> None:
    supervisor = supervised(child(tmp_path, "raise SystemExit(1)"))
    one = supervisor.running[0]
    wait_for(lambda: one.restarts >= 3)
    assert one.failures == one.restarts
    assert one.last_end == "ended with exit code 1"
    assert one.due - time.monotonic() <= 0.5 * 2.0**2 + 0.1


def test_a_child_that_no_restart_cures_ends_the_supervisor_with_its_own_words(tmp_path: Path) -> None:
    code = "import sys; print('fedpeft: base tiny: no such folder', file=sys.stderr); sys.exit(5)"
    bystander = child(tmp_path, SLEEPER, "bystander")
    supervisor = Supervisor((bystander, child(tmp_path, code, "worker", fatal=frozenset({5}))), tmp_path / "supervisor.json", tick=0.02)
    with pytest.raises(BaseError, match="base tiny: no such folder"):
        supervisor.run()
    assert supervisor.running[0].process is None


def test_the_watchdog_ends_a_child_without_progress(tmp_path: Path, supervised) -> None:
    pulse = tmp_path / "worker.json"
    code = (
        "from fedpeft_client.status import Pulse; from pathlib import Path; import sys, time\n"
        f"pulse = Pulse(Path({str(pulse)!r})); pulse.progress('triage', 3); time.sleep(60)"
    )
    supervisor = supervised(child(tmp_path, code, hung=lambda pid: status.hung(pulse, 0.3, pid)))
    one = supervisor.running[0]
    wait_for(lambda: one.restarts >= 1)
    assert one.last_end.startswith("ended by the watchdog: no progress with 'triage'") or one.restarts > 1


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from fedpeft_client.supervisor import Child, Supervisor\n"
        f"child = Child('sleeper', (sys.executable, '-c', {SLEEPER!r}), dict(os.environ), Path({str(tmp_path / 'log')!r}))\n"
        f"Supervisor((child,), Path({str(tmp_path / 'supervisor.json')!r})).run()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    state = tmp_path / "supervisor.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["children"][0]["pid"])
    pid = json.loads(state.read_text())["children"][0]["pid"]
    time.sleep(0.5)
    parent.kill()
    wait_for(lambda: not alive(pid))
    parent.wait()


def test_a_child_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpeft_client import supervisor as room

    monkeypatch.setattr(room, "GRACE_SECONDS", 0.3)
    code = "import signal, time, pathlib, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    supervisor = Supervisor((child(tmp_path, code),), tmp_path / "supervisor.json", tick=0.02)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    log = tmp_path / "sleeper.log"
    wait_for(lambda: log.exists() and "deaf" in log.read_text())
    pid = supervisor.running[0].pid
    supervisor.stop()
    thread.join(20)
    assert not alive(pid)
