"""S1, S2: serving mixed requests: many adapters in one running batch against one adapter at a time; and latency under a bounded load.

S1 answers the same greedy requests for T adapters, ragged prompts, endings at different times, and counts generated tokens per CPU second:
ours; our engine with one adapter per batch (``alike``), in order of arrival; peft's ``set_adapter`` with Hugging Face's ``generate``, once
as a server sees requests (one after the other) and once with all requests known beforehand and batched by adapter, which no server can
do. The floor is our engine on the base alone. All give the same tokens (checked before timing; rounding may part a few near ties).

S2 sends requests at half the rate that the mixed engine sustains; seconds of the wall from arrival to the first and the last token.
The model is small (stories260k, from the shared folder), so what is measured is mostly what a step costs beside its arithmetic. S1 is told
of an encoder-decoder too, a T5 of random values and about that size: its encoder reads the prompt.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from tests.bench._mixed import kind_of, line, seconds_of

from fedpeft.adapters import Adapter, make_spec
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.methods import Lora
from fedpeft.mixtures import Bank
from fedpeft.serving import End, Engine, Event, Limits, Piece, Request, Sampling, Scheduler
from fedpeft.serving.decoder import Decoder
from fedpeft.tensors import Tensors

MODEL = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[3] / "shared")) / "models" / "stories260k"
TASKS, REQUESTS, RANK, ROWS = (8, 32), 32, 8, 32
LENGTHS, PROMPTS = (12, 33), (4, 40)
LOAD_SECONDS, SHARE = 3.0, 0.5
GOAL = 2.0
TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
KINDS = {"causal": "", "seq2seq": " T5"}


@dataclass(frozen=True)
class Asked:
    """One request: its adapter, prompt, and how many tokens it gets."""

    name: str
    prompt: tuple[int, ...]
    tokens: int


def run(repeats: int = 3) -> list[dict[str, object]]:
    """Rows of tokens per CPU second (larger is better) and of seconds of latency."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            paired = speeds(t5(Path(folder)), TASKS[0], repeats)
        return [row for tasks in TASKS for row in rows(tasks, repeats)] + paired
    finally:
        torch.set_num_threads(threads)


def rows(tasks: int, repeats: int) -> list[dict[str, object]]:
    """Of one number of tasks; latency for the smaller one."""
    base = load_base(BaseSpec(str(MODEL), max_tokens=512))
    found = speeds(base, tasks, repeats)
    if tasks != TASKS[0]:
        return found
    with Bank.attach(base, HeadSpec("lm"), _adapters(base, tasks)) as bank:
        return found + _latency(base, bank, _requests(tasks))


def t5(folder: Path) -> Base:
    """A random T5 with the words of stories260k."""
    from transformers import T5Config, T5ForConditionalGeneration

    copytree(MODEL, folder, dirs_exist_ok=True, ignore=ignore_patterns("*.safetensors", "config.json", "generation_config.json"))
    marks = {"vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**marks, d_model=64, num_layers=4, num_heads=8, d_ff=172, d_kv=8)).save_pretrained(folder)
    return load_base(BaseSpec(str(folder), max_tokens=512))


def speeds(base: Base, tasks: int, repeats: int) -> list[dict[str, object]]:
    """Tokens per second on ``base``, on its device."""
    adapters, asked = _adapters(base, tasks), _requests(tasks)
    peer = Peer(base, adapters)
    with Bank.attach(base, HeadSpec("lm"), adapters) as bank:
        ours = Ours(base, bank)
        contenders: dict[str, Callable[[], dict[int, list[int]]]] = {
            "mixed": lambda: ours.all(asked),
            "alike": lambda: ours.all(asked, alike=True),
            "floor": lambda: ours.all(asked, bare=True),
            "peft, one by one": lambda: peer.in_turn(asked),
            "peft, all known": lambda: peer.grouped(asked),
        }
        said = {name: work() for name, work in contenders.items() if name != "floor"}
        same = {name: _same(said["mixed"], other) for name, other in said.items()}
        rounds = [{name: seconds_of(work, base.device) for name, work in contenders.items()} for _ in range(repeats)]
        speed = {name: sum(one.tokens for one in asked) / min(each[name] for each in rounds) for name in contenders}
        case = f"serve{KINDS[base.family]} T={tasks} r={RANK}{kind_of(base)}"
        return [_row((case, base.device), name, speed, same[name]) for name in ("alike", "peft, one by one", "peft, all known")]


def _row(where: tuple[str, str], name: str, speed: dict[str, float], same: float) -> dict[str, object]:
    return {
        "row": "S1",
        "case": f"{where[0]} mixed beside {name} ({same:.0%} same tokens)",
        "ours": speed["mixed"],
        "peer": speed[name],
        "ratio": speed["mixed"] / speed[name],
        "goal": f"ratio >= {GOAL:g}",
        "floor_share": speed["mixed"] / speed["floor"],
        "unit": "tokens/s" if where[1] == "cuda" else "tokens/CPU s",
    }


def _adapters(base: Base, tasks: int) -> dict[str, Adapter]:
    return {f"t{number}": _adapter(base, number) for number in range(tasks)}


def _adapter(base: Base, seed: int) -> Adapter:
    spec = make_spec(f"t{seed}", base, Lora(r=RANK, alpha=RANK, targets=("all",)), HeadSpec("lm"))
    return Adapter(spec, Tensors(spec.layout, np.random.default_rng(seed).normal(scale=0.05, size=spec.layout.size).astype(np.float32)))


def _requests(tasks: int) -> list[Asked]:
    """Arrivals in random order of tasks; prompts of random tokens and of random lengths."""
    draw = np.random.default_rng(1)
    sizes, lengths = draw.integers(*PROMPTS, REQUESTS), draw.integers(*LENGTHS, REQUESTS)
    names = draw.permutation([f"t{number % tasks}" for number in range(REQUESTS)])
    return [
        Asked(str(name), tuple(draw.integers(5, 500, int(size)).tolist()), int(n))
        for name, size, n in zip(names, sizes, lengths, strict=True)
    ]


def _same(first: dict[int, list[int]], second: dict[int, list[int]]) -> float:
    pairs = [(a, b) for place in first for a, b in zip(first[place], second[place], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


@dataclass
class Ours:
    """The scheduler over a bank, all requests queued at once."""

    base: Base
    bank: Any

    def all(self, asked: list[Asked], alike: bool = False, bare: bool = False) -> dict[int, list[int]]:
        """Tokens by request."""
        said: dict[int, list[int]] = defaultdict(list)
        scheduler = scheduler_of(self.base, self.bank, Limits(rows=ROWS, queue=REQUESTS, alike=alike))
        for place, one in enumerate(asked):
            scheduler.submit(Request(one.prompt, {} if bare else {one.name: 1.0}, settings(one), _into(said[place])))
        while not scheduler.idle:
            scheduler.step()
        return said


def scheduler_of(base: Base, bank: Any, limits: Limits) -> Scheduler:
    """A scheduler over ``bank``."""
    return Scheduler(Decoder(base, bank), base.tokenizer, frozenset(), limits)


def settings(one: Asked) -> Sampling:
    """Greedy, exactly so many tokens."""
    return Sampling(max_tokens=one.tokens, temperature=0.0, endless=True)


def _into(found: list[int]) -> Callable[[Event], None]:
    return lambda event: found.append(event.token.id) if isinstance(event, Piece) else None


class Peer:
    """peft with all adapters loaded, and Hugging Face's generate."""

    def __init__(self, base: Base, adapters: dict[str, Adapter]) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        names, model = list(adapters), copy.deepcopy(base.model)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type=TYPES[base.family])
        self.model: Any = get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)
        for name, adapter in adapters.items():
            values = {key: torch.from_numpy(array.copy()) for key, array in adapter.tensors.named().items()}
            set_peft_model_state_dict(self.model, values, adapter_name=name)
        self.model.eval()
        self.paired = base.family == "seq2seq"

    def in_turn(self, asked: list[Asked]) -> dict[int, list[int]]:
        """One request after the other, as they come."""
        return {place: tokens for place, one in enumerate(asked) for _, tokens in self._batch([(place, one)])}

    def grouped(self, asked: list[Asked]) -> dict[int, list[int]]:
        """All requests of an adapter in one padded batch, as long as its longest answer."""
        groups: dict[str, list[tuple[int, Asked]]] = defaultdict(list)
        for place, one in enumerate(asked):
            groups[one.name].append((place, one))
        return {place: tokens for group in groups.values() for place, tokens in self._batch(group)}

    @torch.no_grad()
    def _batch(self, group: list[tuple[int, Asked]]) -> list[tuple[int, list[int]]]:
        self.model.set_adapter(group[0][1].name)
        width, limit = max(len(one.prompt) for _, one in group), max(one.tokens for _, one in group)
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(one.prompt)) + list(one.prompt) for _, one in group])
        mask = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for _, one in group])
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=limit,
            min_new_tokens=limit,
            pad_token_id=0,
            eos_token_id=None,
        )
        before = 1 if self.paired else width
        return [(place, row[before : before + one.tokens].tolist()) for (place, one), row in zip(group, out, strict=True)]


@dataclass
class Watch:
    """When one request came, began and ended."""

    came: float
    began: float = 0.0
    ended: float = 0.0
    done: list[bool] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Its sink."""
        self.began = self.began or perf_counter()
        if isinstance(event, End):
            self.ended = perf_counter()


def _latency(base: Base, bank: Any, asked: list[Asked]) -> list[dict[str, object]]:
    """Seconds to the first and the last token, at a share of the rate that mixed batches sustain here and now; in alternating runs."""
    began = perf_counter()
    Ours(base, bank).all(asked)
    rate = SHARE * len(asked) / (perf_counter() - began)
    found: dict[bool, list[Watch]] = {False: [], True: []}
    for _ in range(2):
        for alike in found:
            found[alike] += _loaded(base, bank, asked, rate, alike)
    rows: list[dict[str, object]] = []
    for what, pick in (("first token", lambda one: one.began - one.came), ("last token", lambda one: one.ended - one.came)):
        for percent in (50, 95):
            ours, peer = (float(np.percentile([pick(one) for one in found[alike]], percent)) for alike in (False, True))
            case = f"latency to the {what} p{percent} of {len(found[False])} at {rate:.0f}/s, T={TASKS[0]}, beside alike"
            rows.append({"row": "S2", "case": case, "ours": ours, "peer": peer, "ratio": peer / ours, "goal": "", "unit": "s"})
    return rows


def _loaded(base: Base, bank: Any, asked: list[Asked], rate: float, alike: bool) -> list[Watch]:
    engine = Engine(scheduler_of(base, bank, Limits(rows=ROWS, queue=10_000, alike=alike))).start()
    draw, watches, began, due = np.random.default_rng(2), [], perf_counter(), 0.0
    while due < LOAD_SECONDS:
        due += float(draw.exponential(1.0 / rate))
        sleep(max(began + due - perf_counter(), 0.0))
        one = asked[len(watches) % len(asked)]
        watches.append(Watch(perf_counter()))
        engine.submit(Request(one.prompt, {one.name: 1.0}, settings(one), watches[-1]))
    engine.close(patience=60.0)
    return watches


if __name__ == "__main__":
    for row in run():
        print(line(row))
