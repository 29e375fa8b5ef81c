"""kill -9 at any moment, and a disk without room: a version is listed and whole, or it is not there."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fedpeft.registry import Manifest, Registry

LOOP = """
import sys, itertools
import numpy as np
from pathlib import Path
from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases.spec import HeadSpec
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry
from fedpeft.tensors import Entry, Layout, Tensors

root, first, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
layout = Layout.of([Entry("A", "base_model.model.q.lora_A.weight", (2, size)), Entry("B", "base_model.model.q.lora_B.weight", (6, 2))])
spec = AdapterSpec("area", "f" * 64, "minilm", METHODS["lora"](r=2, alpha=2.0), HeadSpec("lm"), layout)
print("ready", flush=True)
for seed in itertools.count(first):
    adapter = Adapter(spec, Tensors(layout, np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)))
    version = Registry(root).publish(adapter, Manifest(round=seed), f"run/{seed}/area")
    print(seed, version.number, flush=True)
    if seed % 4 == 3:
        print("back", Registry(root).rollback("area", "1").number, flush=True)
"""


def start(root, first, size=4000):
    worker = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(root), str(first), str(size)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline() == "ready\n", worker.stderr.read()
    return worker


def test_kill_nine_at_any_moment_leaves_every_version_whole(tmp_path):
    root, random_delay, told, first = tmp_path / "registry", random.Random(11), {}, 0
    for _ in range(6):
        worker = start(root, first)
        time.sleep(random_delay.uniform(0.0, 0.5))
        os.kill(worker.pid, signal.SIGKILL)
        lines = worker.communicate(timeout=30)[0].split("\n")[:-1]
        told |= {int(seed): int(number) for seed, number in (line.split() for line in lines if not line.startswith("back"))}
        first = max(told, default=0)
        registry = Registry(root)
        assert registry.verify() == ()
        for version in registry.list():
            assert registry.load(version.digest).digest == version.manifest.adapter
    assert len(told) > 8, "the workers were killed before they did anything"
    for seed, number in told.items():
        found = registry.find("area", f"run/{seed}/area")
        assert (found.number, found.manifest.round) == (number, seed), "what was told is kept, and published once"
    origins = [row["origin"] for row in registry.history("area") if row["action"] == "publish"]
    assert len(origins) == len(set(origins))
    assert [row["number"] for row in registry.history("area")] == list(range(1, len(registry.history("area")) + 1))


LIMITED = """
import resource, sys
from pathlib import Path
sys.argv = ["x", sys.argv[1], "0", "4000"]
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from fedpeft.errors import FedpeftError
try:
    exec({loop!r})
except FedpeftError as fault:
    print(type(fault).__name__, fault, file=sys.stderr)
    sys.exit(fault.exit_code)
"""


@pytest.mark.parametrize("limit", [0, 50, 600, 20_000, 40_000])
def test_no_room_is_one_clear_line_and_loses_nothing(tmp_path, make_adapter, limit):
    """A file-size limit stands for a full disk: writes stop in the key, the tensors, or the history."""
    registry = Registry(tmp_path / "registry")
    before = registry.publish(make_adapter(1), Manifest(round=100), "before") if limit else None
    if limit == 600:
        (registry.root / "keys" / "signing.pub").unlink()
    answer = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=limit, loop=LOOP), str(registry.root)], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 9, answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert answer.stderr.startswith("StorageError ")
    assert "File too large" in answer.stderr
    assert registry.verify() == ()
    assert not list(registry.root.rglob("*.partial"))
    if before:
        assert registry.get("area@1") == before
        assert registry.publish(make_adapter(2), Manifest(round=101), "after").number == len(registry.history("area"))


def test_a_folder_without_permission_is_one_clear_line(tmp_path, make_adapter):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    from fedpeft.errors import StorageError

    with pytest.raises(StorageError, match="cannot be written"):
        Registry(blocked / "registry").publish(make_adapter(1), Manifest())
