"""Another process: the trained tensors alone make the same model there, for every method at once, and starts are the same tensors.

Slow: a process that has to import transformers. The catalogue's tests rebuild every method in their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fedpeft.adapters import make_spec
from fedpeft.adapters.starts import make_start
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.config import describe
from fedpeft.methods import METHODS, Lora

KINDS = sorted(METHODS)
MAKING = Path(__file__).parent / "conftest.py"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CHILD = """
import importlib.util, json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from fedpeft.adapters import make_spec
from fedpeft.adapters.starts import make_start
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.config import build
from fedpeft.methods import METHODS, Lora

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
base = load_base(BaseSpec(str(folder / "base"), max_tokens=32), "cpu")
spec = make_spec("t", base, Lora(r=4, alpha=4, targets=("attention",), extra=4, held=True), HeadSpec("lm"))
print(json.dumps([bad, {kind: make_start(kind, base, spec, 3).digest for kind in ("pissa", "olora")}]))
"""


@pytest.fixture(scope="module")
def answer(case_of, shake, make, tmp_path_factory):
    """What the other process says: the methods that answer otherwise there, and the digests of starts."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = [written(case_of(kind), shake, n, folder) for n, kind in enumerate(KINDS)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    write_base(make("llama"), folder / "base")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(MAKING), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bad, starts = json.loads(done.stdout.splitlines()[-1])
    return bad, starts, folder / "base"


def written(case, shake, n, folder):
    """The case, its trained tensors, what it is asked and what it says, as job ``n``."""
    shell, live = case.attach()
    values = shake(case.values(live, shell.config), case.moving(live), seed=n)
    case.write(live, values)
    asked = {f"in.{key}": value for key, value in case.inputs.items()} | {"out": case.logits(live).contiguous()}
    save_file({name: v.contiguous() for name, v in values.items()} | asked, folder / f"{n}.safetensors")
    return {"n": n, "model": case.model, "method": describe(case.method), "head": case.head.kind, "labels": list(case.head.labels)}


def write_base(model, folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w1").save_pretrained(folder)


def test_trained_tensors_alone_rebuild_every_method(answer):
    assert answer[0] == []


def test_starts_are_the_same_tensors(answer):
    base = load_base(BaseSpec(str(answer[2]), max_tokens=32), "cpu")
    spec = make_spec("t", base, Lora(r=4, alpha=4, targets=("attention",), extra=4, held=True), HeadSpec("lm"))
    assert answer[1] == {kind: make_start(kind, base, spec, 3).digest for kind in ("pissa", "olora")}
