"""`fedpeft client join`: the site's SuperNode and worker under one supervisor, and what a person sees of them."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedpeft.files import write_atomic
from fedpeft.locks import held
from fedpeft.processes import free_port
from fedpeft_client import reach, status, supernode
from fedpeft_client.config import SiteConfig, load_site
from fedpeft_client.supervisor import Child, Running, Supervisor

FATAL = frozenset({3, 4, 5})
"""Exit codes of the worker that no restart cures: configuration, data, base."""
OWNER = 0o700
"""Adapters of this site's rows alone lie in its state folder: nobody else on the machine reads them."""


def join(path: Path, on_tick: Callable[[SiteConfig, list[Running], str], None]) -> int:
    """Keep the site of ``path`` in its federation until SIGINT or SIGTERM; then end its processes. Returns the signal's number.

    ``on_tick`` is told the processes, and why the coordinator cannot be reached (empty: it can).

    Raises:
        ConfigError: the file has faults.
        BaseError, DataError: the worker cannot start and restarting would not help.
        StorageError: the state folder is taken, or cannot be written.
    """
    site = load_site(path)
    taken = held(site.state / "lock", "already runs a site on this state folder", "give this site its own `state`", OWNER)
    with taken, reach.Watch(partial(reach.trouble, site.coordinator, site.tls.root_certificates)) as watch:
        supervisor = Supervisor(children(path, site), site.state / "supervisor.json")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, supervisor.stop)
        return supervisor.run(lambda running: on_tick(site, running, watch.found))


def children(path: Path, site: SiteConfig) -> tuple[Child, Child]:
    """The two processes of a site: Flower's SuperNode and our worker."""
    port = site.supernode_port or free_port()
    secret = site.state / "secret"
    write_atomic(secret, secrets.token_hex(32).encode(), mode=0o600)
    pulse = site.state / "worker.json"
    node = (sys.executable, "-m", "fedpeft_client.supernode", *supernode.arguments(site, port, secret))
    work = (sys.executable, "-m", "fedpeft_client.executor", str(path.resolve()), f"127.0.0.1:{port}", str(secret))
    env = environment(site)
    return (
        Child("supernode", node, env, site.state / "supernode.log", explain=partial(supernode.explained, site)),
        Child(
            "worker",
            work,
            env,
            site.state / "worker.log",
            partial(status.hung, pulse, site.watchdog_seconds),
            partial(_felled, pulse),
            FATAL,
        ),
    )


def _felled(pulse: Path, pid: int) -> tuple[str, ...]:
    """A worker that dies with a task in hand leaves the SuperNode waiting: 45 s as a rule, for ever if it was sending its answer."""
    return ("supernode",) if status.busy(pulse, pid) else ()


def environment(site: SiteConfig) -> dict[str, str]:
    """This process's environment with Flower kept offline and inside the state folder, and this venv's scripts first."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    threads = {"OMP_NUM_THREADS": str(site.threads)} if site.threads else {}
    scripts = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {**os.environ, **quiet, **threads, "FLWR_HOME": str(site.state / "flower"), "PATH": scripts, "PYTHONUNBUFFERED": "1"}


def line(site: SiteConfig, running: list[Running], trouble: str = "", steps: bool = True) -> str:
    """The site's state in one line, for people; ``trouble`` is why the coordinator is not reached.

    With ``steps`` it changes with every step and answer; without, as for a log, with what the site does and what hinders it.
    """
    sign = status.read(site.state / "worker.json")
    parts = [f"{one.child.name} {_state(one)}" for one in running]
    if sign is not None:
        parts += [_doing(sign, steps), *(f"NOT ANSWERED: task {task}: {why}" for task, why in sorted(sign.faults.items()))]
    if trouble:
        parts.append(f"NOT REACHED: {trouble}")
    return f"{site.name} -> {site.coordinator}: " + "; ".join(parts)


def _doing(sign: status.Sign, steps: bool) -> str:
    idle = not sign.busy or (not steps and sign.busy == status.MESSAGE)
    doing = "waiting for the coordinator" if idle else f"{sign.busy}{f', step {sign.step}' if sign.step and steps else ''}"
    return f"{doing}; answered {sign.answered}, base loaded {sign.base_loads} time{'s' * (sign.base_loads != 1)}" if steps else doing


def _state(one: Running) -> str:
    restarts = f", {one.restarts} restart{'s' * (one.restarts != 1)}" if one.restarts else ""
    if one.process is None:
        return f"down ({one.last_end}){restarts}"
    return f"up{restarts}"
