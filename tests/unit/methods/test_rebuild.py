"""The trained tensors alone make the same model in another process, for every method at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fedpeft.config import describe
from fedpeft.methods import METHODS

KINDS = sorted(METHODS)
MAKING = Path(__file__).parent / "conftest.py"

pytestmark = pytest.mark.filterwarnings("ignore")

CHILD = """
import importlib.util, json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build
from fedpeft.methods import METHODS

torch.manual_seed(4711)
folder = Path(sys.argv[2])
spec = importlib.util.spec_from_file_location("models", sys.argv[1])
models = importlib.util.module_from_spec(spec)
sys.modules["models"] = models
spec.loader.exec_module(models)
bad = []
for job in json.loads((folder / "jobs.json").read_text()):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = models.MAKERS[job["model"]]().eval()
    torch.randn(job["n"])
    method = build(METHODS, job["method"], "method")
    held = load_file(folder / f"{job['n']}.safetensors")
    live = method.attach(model, HeadSpec(job["head"], tuple(job["labels"]))).eval()
    for name, (_, p) in method.entries(live).items():
        p.data = held[name]
    with torch.no_grad():
        got = live(**{key[3:]: value for key, value in held.items() if key.startswith("in.")}).logits
    if not torch.allclose(got, held["out"], atol=1e-5):
        bad.append((job["method"]["kind"], float((got - held["out"]).abs().max())))
print(json.dumps(bad))
"""


def test_trained_tensors_alone_rebuild_every_method_in_another_process(case_of, shake, tmp_path):
    jobs = []
    for n, kind in enumerate(KINDS):
        case = case_of(kind)
        shell, live = case.attach()
        values = shake(case.values(live, shell.config), case.moving(live), seed=n)
        case.write(live, values)
        asked = {f"in.{key}": value for key, value in case.inputs.items()} | {"out": case.logits(live).contiguous()}
        save_file({name: v.contiguous() for name, v in values.items()} | asked, tmp_path / f"{n}.safetensors")
        head = {"head": case.head.kind, "labels": list(case.head.labels)}
        jobs.append({"n": n, "model": case.model, "method": describe(case.method), **head})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(MAKING), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
