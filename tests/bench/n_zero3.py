"""N: that no rank of a ZeRO-3 job ever holds the whole base: peak resident memory of two ranks beyond what they had, over the base's bytes.

    python -m tests.bench.n_zero3

A random Llama of 81 million parameters in float32 lies on disk; two ranks load it and train one step, under stage 0, under stage 3, and
under stage 3 with few gathered parameters. Counted is anonymous memory, sampled every millisecond: what safetensors maps from disk can be
dropped at any time, and is a column of its own. Large blocks are given back when they are freed (``MALLOC_MMAP_THRESHOLD_``): otherwise
glibc keeps those of up to 32 MiB, and what is counted is its holes. The peer is stage 0, where every rank holds all; the floor is half.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS = 2
WORDS, HIDDEN, WIDE, LAYERS = 8192, 1024, 2816, 5
FEW = {
    "stage": 3,
    "stage3_max_live_parameters": 4_000_000,
    "stage3_prefetch_bucket_size": 4_000_000,
    "stage3_param_persistence_threshold": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 10_000},
    "stage 3, few gathered": FEW,
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
JOB = """
name = "zero"
output = "{name}"
deepspeed = "{name}.json"
base = {{ model = "base", max_tokens = 32 }}
method = {{ kind = "lora", r = 4, targets = ["attention"] }}
training = {{ steps = 1, batch_size = 2, lr = 0.01, save_every = 100 }}
tasks = {{ only = {{ kind = "generation", metrics = ["perplexity"], data = {{ path = "rows.jsonl" }} }} }}
"""


def run(repeats: int = 1) -> list[dict[str, object]]:
    """All rows; ``repeats`` is there for the common form: memory needs no minimum."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        whole = _write(folder)
        started = {name: _started(folder, name) for name in CASES}
        found = {name: [json.loads(rank.communicate(timeout=560)[0].splitlines()[-1]) for rank in ranks] for name, ranks in started.items()}
        apart = _distance(folder)
    rows = [row for name, ranks in found.items() for row in _rows(name, ranks, found["stage 0"], whole)]
    return [*rows, {"row": "N8", "case": "exported adapter of stage 3 beside stage 0's, relative", "ours": apart, "unit": ""}]


def _rows(name: str, ranks: list[dict[str, float]], peer: list[dict[str, float]], whole: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for row, part in (("N6", "loading"), ("N7", "training")):
        ours, theirs = (max(rank[part] for rank in each) / whole for each in (ranks, peer))
        case = f"{name}: peak of a rank while {part}, of the whole base"
        rows.append({"row": row, "case": case, "ours": ours, "peer": theirs, "ratio": theirs / ours, "unit": f"of {whole >> 20} MiB"})
        rows[-1] |= {"floor": 1 / RANKS, "floor_share": 1 / RANKS / ours, "mapped": max(rank["mapped"] for rank in ranks) / whole}
    return rows


def _write(folder: Path) -> int:
    """A base with its tokenizer, rows, and the job of each case; the base's bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))
    model.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{place}": place for place in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2", model_max_length=64)
    named.save_pretrained(folder / "base")
    rows = [{"prompt": f"w{3 + place} w{9 + place}", "completion": f"w{5 + place} w7", "split": "train"} for place in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, zero in CASES.items():
        (folder / f"{_file(name)}.json").write_text(json.dumps({"zero_optimization": zero}))
        (folder / f"{_file(name)}.toml").write_text(JOB.format(name=_file(name)))
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _started(folder: Path, name: str) -> list[subprocess.Popen[str]]:
    """The ranks of one case, each of which will say what it measured."""
    from fedpeft.processes import free_port

    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    places = [os.environ | shared | MALLOC | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.n_zero3", str(folder), _file(name)]
    return [subprocess.Popen(command, env=place, stdout=subprocess.PIPE, text=True) for place in places]


def _distance(folder: Path) -> float:
    """Norm of the difference of both adapters over the norm of how far training moved one."""
    import numpy as np

    from fedpeft.central.job import prepare, trained
    from fedpeft.training.config import load_central

    os.chdir(folder)
    found = {}
    for name in ("stage-0", "stage-3"):
        config = load_central(folder / f"{name}.toml")
        start = prepare(config, {}).adapters
        found[name] = trained(config, start).adapters["only"].tensors.flat
    moved = found["stage-0"] - start["only"].tensors.flat
    return float(np.linalg.norm(found["stage-3"] - found["stage-0"]) / np.linalg.norm(moved))


class Watch:
    """The peak of this process's anonymous memory and of what it maps from files, in bytes beyond what it had."""

    def __init__(self) -> None:
        self.start = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def restart(self) -> tuple[int, int]:
        """The peaks so far; the next are counted anew, from the same start."""
        found = self.peak[0] - self.start[0], self.peak[1] - self.start[1]
        self.peak = _resident()
        return found

    def _look(self) -> None:
        while not self._stop.is_set():
            now = _resident()
            self.peak = max(self.peak[0], now[0]), max(self.peak[1], now[1])
            time.sleep(0.001)


def _resident() -> tuple[int, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return kilobytes["RssAnon"] << 10, kilobytes["RssFile"] << 10


def _rank(folder: Path, name: str) -> dict[str, float]:
    """One rank of one case."""
    from fedpeft.central import job
    from fedpeft.central.world import World
    from fedpeft.training.config import load_central

    os.chdir(folder)
    found: dict[str, float] = {}
    load: Callable[..., Any] = job.load

    def watched(*arguments: Any) -> Any:
        found["watch"] = Watch()  # type: ignore[assignment]
        base = load(*arguments)
        found["loading"], found["mapped"] = found["watch"].restart()  # type: ignore[attr-defined]
        return base

    job.load = watched
    world = World.of(os.environ)
    assert world is not None
    job.run(load_central(folder / f"{name}.toml"), world)
    found["training"], _ = found.pop("watch").restart()  # type: ignore[attr-defined]
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_rank(Path(sys.argv[1]), sys.argv[2])))
    else:
        for row in run():
            print("  ".join(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()))
