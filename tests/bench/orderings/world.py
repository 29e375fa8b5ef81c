"""What all cells share: the warm base, the task, its rows encoded once."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from tests.bench.orderings.partition import Places, dirichlet
from tests.bench.orderings.shallow import make_shallow, warm

from fedpeft.adapters import AdapterSpec, make_spec
from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.methods import Lora
from fedpeft.tasks import Classification, Encoded, Row

LAYERS = 2
MAX_TOKENS = 24
TRAIN, HELD, TEST = 40, 10, 10
"""Rows per intent: at most so many to train on, the last of the training split to choose a learning rate on, and of the test split."""


@dataclass(frozen=True, eq=False)
class World:
    """``splits``: ``train``, ``validation`` (to choose a learning rate on) and ``test``."""

    base: Base
    task: Classification
    splits: dict[str, Encoded]

    def spec(self, rank: int) -> AdapterSpec:
        """LoRA of ``rank`` on the attention, scale 1, and a head over all intents."""
        return make_spec(self.task.name, self.base, Lora(r=rank, alpha=rank), self.task.head)

    def sites(self, count: int, alpha: float, seed: int) -> tuple[Encoded, ...]:
        """The training rows, dealt out."""
        train = self.splits["train"]
        return tuple(pick(train, places) for places in dirichlet(train.labels, count, alpha, seed))


def pick(data: Encoded, places: Places) -> Encoded:
    """The examples at ``places``."""
    ids = tuple(data.ids[place] for place in places)
    return replace(data, ids=ids, labels=data.labels[places], starts=data.starts[places], owners=np.arange(len(places)))


@cache
def make_world(path: Path) -> World:
    """Read the rows of ``path`` and load MiniLM, its frozen bottom computed for every row."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    labels = tuple(sorted({row["label"] for row in rows}))
    base = load_base(BaseSpec("minilm", max_tokens=MAX_TOKENS), "cpu")
    make_shallow(base, LAYERS)
    task = Classification("banking77", labels)
    splits = {name: task.encode(part, base) for name, part in split(rows, labels).items()}
    for data in splits.values():
        warm(base, data)
    return World(base, task, splits)


def split(rows: list[Row], labels: tuple[str, ...]) -> dict[str, list[Row]]:
    """Rows of each split, by label; no row is in two of them."""
    found: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for label in labels:
        mine = [row for row in rows if row["label"] == label]
        train = [row for row in mine if row["split"] == "train"]
        found["train"] += train[:-HELD][:TRAIN]
        found["validation"] += train[-HELD:]
        found["test"] += [row for row in mine if row["split"] == "test"][:TEST]
    return found
