"""The tasks, their rows and their adapters: fixed before anything is measured, trained by the platform's own loop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.numpy as safetensors

from fedpeft.adapters import Adapter, attach, initial, load, make_spec, save
from fedpeft.bases import Base, BaseSpec, Encoder, load_base
from fedpeft.bases.encoders import make_encoder
from fedpeft.central.cards import cards as by_texts
from fedpeft.central.cards import onto
from fedpeft.methods import Lora
from fedpeft.routing import ArrowRouter, GateRouter, Request, RouterCard, counts_of, derive
from fedpeft.routing.cardfile import lora_modules
from fedpeft.tasks import Generation, Row
from fedpeft.training import TrainJob, TrainSettings, train
from fedpeft.training.gates import train_gates

TASKS = ("snips_slots", "shakespeare", "tldr", "gsm8k", "svamp", "sms_spam", "banking77", "clinc150")
"""Every set of one task in the folder."""
STRANGERS = ("seed_tasks", "t0_mix", "induction")
"""Every set of many tasks: out of scope of all adapters."""
METHOD = Lora(r=16, targets=("all",))
TRAINING = TrainSettings(steps=150, batch_size=16, lr=5e-3)
GATES = TrainSettings(steps=100, batch_size=16, lr=1e-3)
ENCODERS = ("minilm", "base")
"""What embeds rows and requests, side by side."""
TOKENS, CARDED, SCORED, FEW = 128, 1000, 64, 16
"""Longest text; training rows for a card, for router scores, and for few-shot weights."""


@dataclass(frozen=True)
class World:
    """The base, the encoder of requests, and by task its training and test rows, its adapter and its router card."""

    base: Base
    encoder: Encoder
    train: dict[str, list[Row]]
    test: dict[str, list[Row]]
    strangers: dict[str, list[str]]
    adapters: dict[str, Adapter]
    cards: dict[str, RouterCard]


def rows_of(path: Path) -> dict[str, list[Row]]:
    """Rows ``{prompt, answer}`` by split, shuffled by a fixed seed; a text without an answer is cut in the middle."""
    found: dict[str, list[Row]] = {}
    with open(path, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if (pair := _pair(row)) is not None:
                found.setdefault(str(row.get("split", "train")), []).append(pair)
    for rows in found.values():
        Random(0).shuffle(rows)
    return found


def _pair(row: dict[str, Any]) -> Row | None:
    if "answer" in row:
        return {"prompt": row["prompt"], "answer": row["answer"]}
    if "instruction" in row:
        return {"prompt": f"{row['instruction']} {row.get('input') or ''}".strip(), "answer": row["output"]}
    if "label" in row:
        return {"prompt": row["text"], "answer": row["label"]}
    words = row["text"].split()
    return {"prompt": " ".join(words[: len(words) // 2]), "answer": " ".join(words[len(words) // 2 :])} if len(words) > 5 else None


@dataclass(frozen=True)
class Size:
    """How large a run is: ``tests`` rows a task are kept for measuring, ``steps`` scales the training; ``keep`` is where it is kept."""

    tests: int = 100
    steps: float = 1.0
    keep: Path | None = None


def make_world(data: Path, models: Path, size: Size, encoders: Sequence[str] = ENCODERS) -> World:
    """Train all adapters, then their gates."""
    base = load_base(BaseSpec(str(models / "stories260k"), max_tokens=TOKENS))
    encoder = make_encoder(encoders, base, lambda model: load_base(BaseSpec(model)))
    split = {name: rows_of(data / f"{name}.jsonl") for name in TASKS}
    trained = {name: split[name]["train"][:1000] for name in TASKS}
    strangers = {
        name: [row["prompt"] for rows in rows_of(data / f"{name}.jsonl").values() for row in rows][: size.tests] for name in STRANGERS
    }
    adapters, cards = {}, {}
    for name in TASKS:
        adapters[name], gates = _kept(base, name, trained[name], size)
        derived = derive(adapters[name].tensors, gates=gates)
        cards[name] = _card(base, [row["prompt"] for row in trained[name][:SCORED]], derived)
        print(f"trained {name}", flush=True)
    cards = embedded(cards, encoder, trained)
    return World(base, encoder, trained, {name: split[name]["test"][: size.tests] for name in TASKS}, strangers, adapters, cards)


def _kept(base: Base, name: str, rows: list[Row], size: Size) -> tuple[Adapter, dict[str, Any]]:
    """A specialist and its gates, trained here or by a run of the same size before."""
    folder = None if size.keep is None else size.keep / f"{name}-{size.steps}"
    if folder is not None and folder.is_dir():
        return load(folder), safetensors.load_file(folder / "gates")
    adapter, gates = _specialist(base, name, rows, size.steps)
    if folder is not None:
        save(adapter, folder)
        safetensors.save_file(gates, folder / "gates")
    return adapter, gates


def _specialist(base: Base, name: str, rows: list[Row], scale: float) -> tuple[Adapter, dict[str, Any]]:
    task = Generation(name, ("perplexity",))
    spec = make_spec(name, base, METHOD, task.head)
    data = task.encode(rows, base)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        train(live, task, data, _scaled(TRAINING, scale), TrainJob(spec.layout.roles, 0))
        tensors = live.read()
        gates = train_gates(live, task, data, _scaled(GATES, scale), TrainJob(frozenset(), 0))
    return Adapter(spec, tensors), gates


def _scaled(settings: TrainSettings, scale: float) -> TrainSettings:
    return TrainSettings(max(int(settings.steps * scale), 1), settings.batch_size, settings.lr)


def _card(base: Base, texts: list[str], derived: RouterCard) -> RouterCard:
    """The part of a card that hidden states of ``texts`` make: how often which router scores them how."""
    routers = (GateRouter({"own": derived.gates}), ArrowRouter({"own": derived.arrows}))
    scores: dict[str, list[float]] = {router.kind: [] for router in routers}
    for request in requests(base, texts, sorted(derived.gates)):
        for router in routers:
            scores[router.kind].append(router.route(request).score)
    return replace(derived, counts={kind: counts_of(np.array(values)) for kind, values in scores.items()})


def embedded(cards: dict[str, RouterCard], encoder: Encoder, trained: dict[str, list[Row]]) -> dict[str, RouterCard]:
    """``cards`` with what embeddings of training rows make of them, as one site a task and the coordinator would: from sums alone."""
    made = by_texts({name: [row["prompt"] for row in rows[:CARDED]] for name, rows in trained.items()}, encoder)
    return {name: onto(cards[name], made[name]) for name in cards}


def requests(base: Base, texts: Iterable[str], modules: list[str]) -> Iterable[Request]:
    """Texts as token routers see them."""
    for text in texts:
        states = base.watch(text, modules)
        yield Request(watch=lambda states=states: states)


def modules(world: World) -> list[str]:
    """The adapted modules."""
    return sorted(lora_modules(next(iter(world.adapters.values())).spec.layout))
