"""N: that no rank of a ZeRO-3 job ever holds the whole base: peak resident memory of two ranks beyond what they had, over the base's bytes.

    python -m tests.bench.n_zero3

A random Llama of 81 million parameters in float32 lies on disk; two ranks load it and train one step, under stage 0, under stage 3, and
under stage 3 with few gathered parameters. Counted is anonymous memory, sampled every millisecond: what safetensors maps from disk can be
dropped at any time, and is a column of its own. Large blocks are given back when they are freed (``MALLOC_MMAP_THRESHOLD_``): otherwise
glibc keeps those of up to 32 MiB, and what is counted is its holes. The peer is stage 0, where every rank holds all; the floor is half.
One process imports everything, once, also what a job imports on its way, which a first run says and is not counted then; it is forked into
the ranks of each case, one case after the other, so that nothing keeps the sampling waiting.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
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
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.n_zero3", place]
        said = subprocess.run(
            command, env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    whole, found, apart = json.loads(said.splitlines()[-1])
    rows = [row for name, ranks in found.items() for row in _rows(name, ranks, found["stage 0"], whole)]
    return [*rows, {"row": "N8", "case": "exported adapter of stage 3 beside stage 0's, relative", "ours": apart, "unit": ""}]


def _measured(folder: Path) -> tuple[int, dict[str, list[Any]], float]:
    """The base's bytes, what the ranks of each case measured, and the distance of two adapters; this process itself does no work."""
    from fedpeft.central import job
    from fedpeft.central.world import World, start_deepspeed

    assert job.run
    start_deepspeed(World())
    (whole,) = _forked(folder, _write, [(folder,)])
    for name in _forked(folder, _imported, [(folder, _file("stage 3"), world) for world in _worlds()])[0]:
        with suppress(ImportError):
            import_module(name)
    shutil.rmtree(folder / _file("stage 3"))  # or the case would go on where that run ended
    found = {name: _forked(folder, _rank, [(folder, _file(name), world) for world in _worlds()]) for name in CASES}
    (apart,) = _forked(folder, _distance, [(folder,)])
    return whole, found, apart


def _imported(folder: Path, name: str, world: Any) -> list[str]:
    """The modules that one rank of a case has in the end."""
    _rank(folder, name, world)
    return [module for module in sys.modules if module != "__main__"]


def _worlds() -> list[Any]:
    from fedpeft.central.world import World
    from fedpeft.processes import free_port

    port = free_port()
    return [World(rank, rank, RANKS, port=port) for rank in range(RANKS)]


def _forked(folder: Path, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What ``work`` answers to each of ``calls``, all at once, each in a copy of this process."""

    def child(number: int) -> None:
        (folder / f"answer.{number}").write_text(json.dumps(work(*calls[number])))

    started = [get_context("fork").Process(target=child, args=(number,)) for number in range(len(calls))]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{work.__name__}{calls}: exit code {process.exitcode}")
    return [json.loads((folder / f"answer.{number}").read_text()) for number in range(len(calls))]


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


def _rank(folder: Path, name: str, world: Any) -> dict[str, float]:
    """One rank of one case."""
    from fedpeft.central import job
    from fedpeft.training.config import load_central

    os.chdir(folder)
    found: dict[str, float] = {}
    watches: list[Watch] = []
    load: Callable[..., Any] = job.load

    def watched(*arguments: Any) -> Any:
        watches.append(Watch())
        base = load(*arguments)
        found["loading"], found["mapped"] = watches[0].restart()
        return base

    job.load = watched
    job.run(load_central(folder / f"{name}.toml"), world)
    found["training"], _ = watches[0].restart()
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_measured(Path(sys.argv[1]))))
    else:
        for row in run():
            print("  ".join(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()))
