"""Every launcher with real ranks: torchrun, the Slurm script under a step of two tasks, a host file whose ssh runs its line here."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from fedpeft.processes import free_port
from fedpeft.training import checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(700)]

ROOT = Path(__file__).parents[3]
JOB = """
name = "pair"
output = "out"
registry = "registry"
base = {{ model = "{model}", max_tokens = 32 }}
method = {{ kind = "lora", r = 2, targets = ["attention"] }}
training = {{ steps = 2, batch_size = 4, lr = 0.01 }}
deepspeed = {{ stage = 1, timeout = 60.0 }}
tasks = {{ only = {{ kind = "generation", metrics = ["perplexity"], data = {{ path = "rows.jsonl" }} }} }}
"""
SSH = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do [ "$1" = -o ] && shift; shift; done
echo "$1" >> "$SEEN"
exec sh -c "$2"
"""
"""ssh that runs its line on this machine, and notes for which."""
SRUN = """#!/bin/sh
echo "$*" >> "$SEEN"
shift
for place in 0 1; do
  SLURM_PROCID=$place SLURM_LOCALID=$place SLURM_NTASKS=2 SLURM_STEP_NODELIST='localhost' "$@" &
  started="$started $!"
done
for one in $started; do wait "$one" || code=$?; done
exit "${code:-0}"
"""
"""srun as far as a task sees it: two of them on this machine, with Slurm's variables."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_models) -> Path:
    place = tmp_path_factory.mktemp("launchers")
    rows = [{"prompt": f"Once {i}", "completion": f"there was {i}", "split": "test" if i < 2 else "train"} for i in range(20)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "job.toml").write_text(JOB.format(model=shared_models / "stories260k"))
    (place / "hosts").write_text("localhost slots=1\nme@localhost slots=1\n")
    for name, text in (("ssh", SSH), ("srun", SRUN)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return place


def torchrun(port: int) -> list[str]:
    return [
        *("torchrun", "--nproc-per-node", "2", "--master-port", str(port), "--no-python"),
        *("fedpeft", "central", "train", "job.toml", "--launcher", "torchrun"),
    ]


COMMANDS = {
    "local": lambda _: shlex.split("fedpeft central train job.toml --ranks 2"),
    "torchrun": torchrun,
    "slurm": lambda _: ["bash", str(ROOT / "deploy/slurm/train.sbatch"), "job.toml"],
    "hostfile": lambda _: shlex.split("fedpeft central train job.toml --launcher hostfile --hostfile hosts"),
}


@pytest.fixture(scope="module")
def started(folder) -> dict[str, tuple[int, str]]:
    """Exit code and output of the same job under every launcher, all at once."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path, processes = f"{folder}{os.pathsep}{clean['PATH']}", {}
    for name, command in COMMANDS.items():
        port = free_port()
        own = {
            "PATH": path,
            "MASTER_PORT": str(port),
            "SLURM_JOB_ID": "7",
            "SEEN": str(folder / f"{name}.seen"),
            "PYTHONWARNINGS": "ignore",
        }
        line = [*command(port), "--set", f"output={name}"]
        with (folder / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(line, cwd=folder, env=clean | own, stdout=log, stderr=log)
    try:
        return {name: (process.wait(600), (folder / f"{name}.log").read_text()) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("launcher", COMMANDS)
def test_two_ranks_train_and_publish(folder, started, launcher):
    code, said = started[launcher]
    assert code == 0, said[-3000:]
    assert said.count("published only@") == 1  # rank 0 alone
    ours, local = (checkpoint.read(folder / name / "checkpoint") for name in (launcher, "local"))
    assert ours is not None
    assert local is not None
    assert ours.arrays["only|value"].tobytes() == local.arrays["only|value"].tobytes()


def test_hosts_and_steps_are_called_as_written(folder, started):
    assert (folder / "hostfile.seen").read_text().split() == ["localhost", "me@localhost"]
    assert (folder / "slurm.seen").read_text().startswith("--kill-on-bad-exit=1 fedpeft central train job.toml --launcher slurm")
