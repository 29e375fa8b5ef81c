"""Mixtures on a GPU: rows A1-A3, A5, A7 and S1, on bases in bf16 and in 4 bit, each printed as soon as it is measured.

    python -m tests.gpu.mixtures [--device cuda] [--seconds 90] [--json FILE]

Cases go from what matters most to what matters least, and none begins after ``--seconds``. A case that fails is a row with its fault. peft
attaches adapters in time that grows with the square of their number: where that would take too long, ours stands beside the base
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

BOUNDS = Bounds(attach=6.0, rounds=2.5)
ROUNDS = {"floor": 10, "ours": 10, "single": 10, "sequential": 3, "mixed": 3}
SHORT = [(Setting(8, 32), 2.7), (Setting(32, 32), 2.9), (Setting(128, 32), 5.8)]
LONG = [(Setting(8, 512), 0.0), (Setting(32, 256), 0.0)]
EXPERTS = [(8, Setting(8, 256), 3.0), (16, Setting(16, 256), 4.5)]
SERVED = 8
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
    """Name and rows of every case, what matters most first."""
    bases, trains = Bases(device), SHORT if device == "cuda" else SHORT[:2]
    for kind in ("bf16" if device == "cuda" else "none", "nf4"):
        for setting, goal in trains:
            yield f"A1-A3 {kind} {setting.label}", partial(_trained, bases, kind, setting, goal)
        for experts, setting, goal in EXPERTS:
            yield f"A5 {kind} K={experts}", partial(_mixed, bases, kind, experts, (setting, goal))
        for setting, goal in LONG if device == "cuda" else ():
            yield f"A1b {kind} {setting.label}", partial(_trained, bases, kind, setting, goal)
        yield f"S1 {kind}", partial(_served, bases, kind)
    for experts in (8, 32):
        yield f"A7 E={experts}", partial(_arrow, bases, experts)


def _trained(bases: Bases, kind: str, setting: Setting, goal: float) -> Rows:
    base, peer = bases(kind)
    yield from a1_mixed.measured(base, peer, setting, goal, rounds=ROUNDS, bounds=BOUNDS)


def _mixed(bases: Bases, kind: str, experts: int, what: tuple[Setting, float]) -> Rows:
    base, peer = bases(kind)
    yield a5_mixture.measured(base, peer, experts, what[0], goal=what[1], repeats=10, bounds=BOUNDS)


def _served(bases: Bases, kind: str) -> Rows:
    yield from s_serving.speeds(bases(kind)[0], SERVED, 1)


def _arrow(bases: Bases, experts: int) -> Rows:
    yield from a7_arrow.measured(bases("bf16" if bases.device == "cuda" else "none")[0], experts, 10)


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
        print(f"# {name}: {perf_counter() - began - spent:.1f} s", flush=True)


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    table = {"<unk>": 0, **{f"w{place}": place for place in range(1, words)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table, unk_token="<unk>")), unk_token="<unk>", pad_token="<unk>")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for one in run(arguments.device, arguments.seconds):
        found.append(one)
        print(line(one), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
