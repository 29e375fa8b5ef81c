"""Mixtures on a GPU: rows A1-A3, A5, A7 and S1, on bases in bf16 and in 4 bit, each printed as soon as it is measured.

    python -m tests.gpu.mixtures [--device cuda] [--seconds 210] [--json FILE]

Every kind of row comes once on both bases before the larger settings, and no case begins after ``--seconds``. A case that fails is a row
with its fault, and the file is written after every row. Where peft would attach its adapters too slowly, ours stands beside the base
alone. With ``--device cpu`` a tiny model runs through the same code, so that it is tested; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tests.bench import a1_mixed, a5_mixture, a7_arrow, s_serving
from tests.bench._mixed import Bounds, Peft, Setting, base_of, line

BOUNDS = Bounds(attach=25.0, rounds=2.5)
ROUNDS = {"floor": 10, "ours": 10, "single": 10, "sequential": 3, "mixed": 3}
TRAINED = {8: (Setting(8, 32), 2.7), 32: (Setting(32, 32), 2.9), 128: (Setting(128, 32), 5.8)}
LONG = {8: (Setting(8, 512), 0.0), 32: (Setting(32, 256), 0.0)}
MIXED = {8: (Setting(8, 256), 3.0), 16: (Setting(16, 256), 4.5)}
ORDER = (("A1-A3", 8), ("A1-A3", 32), ("A5", 8), ("A1b", 8), ("A7", 8), ("S1", 8), ("A1-A3", 128), ("A5", 16), ("A1b", 32), ("A7", 32))
"""Kind of rows, and its number of tasks, experts or served adapters."""
Rows = Iterator[dict[str, object]]
Case = tuple[str, Callable[[], Rows]]


class Bases:
    """Bases by quantization, and peft's model on each, made when first needed."""

    def __init__(self, device: str) -> None:
        self.device, self._made = device, dict[str, tuple[Any, Peft]]()

    def __call__(self, kind: str) -> tuple[Any, Peft]:
        """The base in ``kind``, and its peer."""
        if kind not in self._made:
            base = base_of(self.device, kind, "tiny" if self.device == "cpu" else None)
            base.tokenizer = _tokenizer(base.config.vocab_size)
            self._made[kind] = base, Peft(base)
        return self._made[kind]


def cases(device: str) -> Iterator[Case]:
    """Name and rows of every case, what matters most first; without a card those that take seconds alone."""
    bases, made = Bases(device), {"A1-A3": _trained, "A1b": _long, "A5": _mixed, "S1": _served, "A7": _arrow}
    for what, count in ORDER if device == "cuda" else ORDER[:6]:
        for kind in ("bf16" if device == "cuda" else "none", "nf4"):
            yield f"{what} {kind} {count}", partial(made[what], bases, kind, count)


def _trained(bases: Bases, kind: str, tasks: int) -> Rows:
    base, peer = bases(kind)
    yield from a1_mixed.measured(base, peer, *TRAINED[tasks], rounds=ROUNDS, bounds=BOUNDS)


def _long(bases: Bases, kind: str, tasks: int) -> Rows:
    base, peer = bases(kind)
    yield from a1_mixed.measured(base, peer, *LONG[tasks], rounds=ROUNDS, bounds=BOUNDS)


def _mixed(bases: Bases, kind: str, experts: int) -> Rows:
    base, peer = bases(kind)
    setting, goal = MIXED[experts]
    yield a5_mixture.measured(base, peer, experts, setting, goal=goal, repeats=10, bounds=BOUNDS)


def _served(bases: Bases, kind: str, adapters: int) -> Rows:
    yield from s_serving.speeds(bases(kind)[0], adapters, 1)


def _arrow(bases: Bases, kind: str, experts: int) -> Rows:
    yield from a7_arrow.measured(bases(kind)[0], experts, 10)


def run(device: str, seconds: float) -> Rows:
    """Rows in order; what no time is left for is named."""
    began = perf_counter()
    for name, rows in cases(device):
        spent = perf_counter() - began
        if spent > seconds:
            yield {"row": "-", "case": name, "skipped": f"{spent:.0f} of {seconds:.0f} s are spent"}
            continue
        try:
            yield from rows()
        except Exception as fault:  # noqa: BLE001 - the cases after it are worth having
            yield {"row": "-", "case": name, "fault": f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"}
        print(f"# {name}: {perf_counter() - began - spent:.1f} s, {perf_counter() - began:.0f} of {seconds:.0f} s in all", flush=True)


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    table = {"<unk>": 0, **{f"w{place}": place for place in range(1, words)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table, unk_token="<unk>")), unk_token="<unk>", pad_token="<unk>")


def main() -> None:
    """Entry point; exit code 1 where a case failed or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=210.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for one in run(arguments.device, arguments.seconds):
        found.append(one)
        print(line(one), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    raise SystemExit(any("fault" in one or "skipped" in one for one in found))


if __name__ == "__main__":
    main()
