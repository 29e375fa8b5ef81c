"""Starting the ranks of a job: on this machine, on machines of a host file over SSH, or under torchrun or Slurm, which start them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedpeft.central.world import World
from fedpeft.errors import ConfigError, LinkError
from fedpeft.processes import FLAG, free_port

Launcher = Literal["local", "torchrun", "slurm", "hostfile"]
LAUNCHERS: tuple[Launcher, ...] = ("local", "torchrun", "slurm", "hostfile")
GRACE = 15.0
"""Seconds that ranks have to end by themselves once one has failed."""
PORT = 29531
"""Where rank 0 listens under Slurm and host files, where no free port can be asked for; ``MASTER_PORT`` says another."""
HOST = re.compile(r"(?P<host>[A-Za-z0-9._:@-]+)(?:\s+slots=(?P<slots>\d+))?")


@dataclass(frozen=True)
class Rank:
    """One process to start: its place, and the machine (None: this one)."""

    world: World
    host: str | None = None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What starts it. Elsewhere the same Python and folder must exist."""
        own = [sys.executable, "-m", "fedpeft", "central", "rank", *arguments]
        if self.host is None:
            return own
        settings = [f"{name}={value}" for name, value in (self.world.environment() | _passed(os.environ)).items()]
        line = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join(settings)} {shlex.join(own)}"
        return ["ssh", "-o", "BatchMode=yes", "-tt", self.host, line]


def line(rank: Rank, arguments: Sequence[str]) -> str:
    """What a shell would be told to start ``rank``."""
    settings = [f"{name}={value}" for name, value in rank.world.environment().items()] if rank.host is None else []
    return " ".join([*settings, shlex.join(rank.command(arguments))])


def here(ranks: int) -> list[Rank]:
    """``ranks`` processes on this machine. Raises `ConfigError` when it is no positive number."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1")
    port = free_port()
    return [Rank(World(rank, rank, ranks, "127.0.0.1", port)) for rank in range(ranks)]


def hosts(path: Path) -> list[Rank]:
    """The ranks of a host file: a line ``HOST slots=N`` a machine, the first one's first rank being rank 0.

    Raises:
        ConfigError: the file cannot be read, or a line is of another form.
    """
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as fault:
        raise ConfigError(f"--hostfile {path}: cannot be read ({fault.strerror}); give a file of lines HOST slots=N") from None
    found = [(line, HOST.fullmatch(line)) for line in lines if line]
    wrong = [line for line, match in found if match is None]
    if wrong or not found:
        raise ConfigError(f"--hostfile {path}: {f'line {wrong[0]!r} is not' if wrong else 'holds no line'} of the form HOST slots=N")
    machines = [(match["host"], int(match["slots"] or 1)) for _, match in found if match]
    total, port = sum(slots for _, slots in machines), int(os.environ.get("MASTER_PORT", PORT))
    first = World(0, 0, total, machines[0][0].rpartition("@")[2], port)
    places = [(host, local) for host, slots in machines for local in range(slots)]
    return [Rank(replace(first, rank=rank, local_rank=local), host) for rank, (host, local) in enumerate(places)]


def slurm(environment: Mapping[str, str]) -> World:
    """This task's place in a Slurm step. Raises `ConfigError` outside of one."""
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NODELIST")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigError(f"--launcher slurm: {missing} are not set; start with srun, one task a GPU (deploy/slurm has a script)")
    rank, local, size = (int(environment[name]) for name in names[:3])
    address = environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"])
    return World(rank, local, size, address, int(environment.get("MASTER_PORT", PORT)))


def first_node(nodes: str) -> str:
    """The first machine of Slurm's compressed list: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    head = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", nodes)
    if head is None:
        raise ConfigError(f"SLURM_STEP_NODELIST = {nodes!r}: no machine's name; set MASTER_ADDR")
    return head[1] + (re.split(r"[-,]", head[2])[0] if head[2] else "")


def supervise(ranks: Sequence[Rank], arguments: Sequence[str], grace: float = GRACE) -> int:
    """Run all ranks to their end: 0, or the exit code of the first that failed, after which the others have ``grace`` seconds.

    When this process ends, however it ends, so do the ranks on this machine.

    Raises:
        LinkError: a rank cannot be started.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in ranks:
            settings = os.environ | rank.world.environment() | {FLAG: "1"}
            started.append(subprocess.Popen(rank.command(arguments), env=settings, stdin=subprocess.PIPE))
        return _watched(started, grace)
    except OSError as fault:
        raise LinkError(f"rank {len(started)}: cannot be started ({fault}); is ssh installed, and Python where it is here?") from None
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _watched(started: Sequence[subprocess.Popen[bytes]], grace: float) -> int:
    first, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in started]):
        failed = [code for code in codes if code]
        if failed and not first:
            first, deadline = failed[0], time.monotonic() + grace
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return _code(first or next((code for code in codes if code), 0))


def _code(code: int) -> int:
    """A process ended by signal N has code 128 + N, as in a shell."""
    return 128 - code if code < 0 and code != -signal.SIGKILL else LinkError.exit_code if code < 0 else code


def _passed(environment: Mapping[str, str]) -> dict[str, str]:
    names = ("PYTHONPATH", "PATH", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG")
    return {name: environment[name] for name in names if environment.get(name)}
