"""What the base says of a federation's adapters: layouts, names, and the values of round 0, as plain values.

Finding them takes torch and transformers, which nothing else at a coordinator needs. So another process finds them (`apart`) and ends,
and what it says of an architecture is remembered (`remembered`). A process that has torch loaded anyway finds them itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft import config as configs
from fedpeft.adapters.drawing import draw, needed
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.bases import BaseSpec, Family, Fingerprint, HeadSpec, fingerprint, load_base, meta_base, meta_encoder, resolve_model
from fedpeft.bases.base import OWN
from fedpeft.bases.spec import CLASSIFIERS
from fedpeft.errors import DataError
from fedpeft.tensors import Layout, Tensors
from fedpeft_coordinator import apart, remembered

if TYPE_CHECKING:
    from pathlib import Path

    from fedpeft.adapters.starts import Samples
    from fedpeft.bases import Base

Table = dict[str, Any]
"""A question or an answer: JSON."""


@dataclass(frozen=True)
class Laid:
    """What a base is to a federation, by task where it is of one.

    ``layouts`` are of the heads that its ``family`` has; ``reads`` the settings of the base's config that drawing round 0 takes, None where
    it takes more than those. ``encoder`` and ``width`` are of what embeds rows.
    """

    family: Family
    encoder: str
    width: int
    layouts: Mapping[str, Layout]
    reads: Mapping[str, Mapping[str, Any] | None]

    @staticmethod
    def read(table: Table) -> Laid:
        """From the answer of `lay`."""
        layouts = {task: Layout.from_json(rows) for task, rows in table["layouts"].items()}
        return Laid(table["family"], table["encoder"], table["width"], layouts, table["reads"])

    def drawn(self, spec: AdapterSpec, seed: int) -> Tensors | None:
        """Round 0 of ``spec`` where a seed and the config's settings make it; the same bits as `fedpeft.adapters.initial`."""
        reads = self.reads[spec.task]
        if reads is None:
            return None
        values = draw(spec, seed, SimpleNamespace(**reads))
        return Tensors.from_named(spec.layout, {entry.name: drawn for entry, drawn in values.items() if drawn is not None})


def laid(base: BaseSpec, known: Fingerprint, method: Any, heads: Mapping[str, HeadSpec], encoders: tuple[str, ...]) -> Laid:
    """What ``base``, whose fingerprint is ``known``, is to ``method`` under ``heads`` (by task), rows being embedded by ``encoders``.

    Raises:
        BaseError: the base, or an encoder, cannot be found or built.
        AdapterError: the method finds nothing to attach to.
    """
    question = {
        "base": asdict(base),
        "known": asdict(known),
        "method": configs.describe(method),
        "heads": {task: asdict(head) for task, head in heads.items()},
        "encoders": list(encoders),
    }
    if "torch" in sys.modules:
        return Laid.read(lay(question))
    matter = {**question, "config": _digest(resolve_model(base.model, base.revision) / "config.json")}
    matter["beside"] = {model: fingerprint(BaseSpec(model)).identity for model in encoders if model != OWN}
    return Laid.read(remembered.answer(matter, lambda: apart.answer("lay", question)))


def lay(question: Table) -> Table:
    """Answer `laid`'s question, with torch."""
    from fedpeft.adapters import make_spec
    from fedpeft.methods import METHODS

    base = meta_base(BaseSpec(**question["base"]), Fingerprint(**question["known"]))
    encoder = meta_encoder(question["encoders"], base)
    method = configs.build(METHODS, question["method"], "method")
    heads = {task: HeadSpec(head["kind"], tuple(head["labels"])) for task, head in question["heads"].items()}
    specs = {
        task: make_spec(task, base, method, head) for task, head in heads.items() if base.family not in CLASSIFIERS or head.kind != "lm"
    }
    return {
        "family": base.family,
        "encoder": encoder.encoder,
        "width": encoder.width,
        "layouts": {task: spec.layout.to_json() for task, spec in specs.items()},
        "reads": {task: needed(spec, base.config) for task, spec in specs.items()},
    }


@dataclass(frozen=True)
class Beginning:
    """Round 0 of one task where the base's weights make it: its rows' form, what starts it, from which rows."""

    spec: AdapterSpec
    seed: int
    task: Any
    how: Any = None
    data: Any = None

    def to_json(self) -> Table:
        """What `begin` reads."""
        return {
            "spec": self.spec.to_json(),
            "seed": self.seed,
            "how": self.how and configs.describe(self.how),
            "data": self.data and self.data.model_dump(mode="json"),
            "task": configs.describe(self.task),
        }


def begun(base: BaseSpec, beginnings: Mapping[str, Beginning]) -> dict[str, Tensors]:
    """Round 0 of each of ``beginnings`` on ``base``.

    Raises:
        AdapterError: a start does not fit its method or the base.
        DataError: a start's rows cannot be read, or none are of its task.
    """
    question = {"base": asdict(base), "tasks": {task: one.to_json() for task, one in beginnings.items()}}
    values = begin(question) if "torch" in sys.modules else apart.answer_bytes("begin", question)
    flat = np.frombuffer(values, "<f4")
    found, start = {}, 0
    for task, one in beginnings.items():
        size = one.spec.layout.size
        found[task] = Tensors(one.spec.layout, flat[start : start + size].astype(np.float32))
        start += size
    return found


def begin(question: Table) -> bytes:
    """Answer `begun`'s question, with torch: the values of all tasks one after the other, as little-endian float32."""
    base = load_base(BaseSpec(**question["base"]), "cpu")
    return b"".join(_round_zero(base, task, table).flat.astype("<f4").tobytes() for task, table in question["tasks"].items())


def _round_zero(base: Base, name: str, table: Table) -> Tensors:
    from fedpeft.adapters import initial
    from fedpeft.adapters.starts import make_start

    spec, seed = AdapterSpec.from_json(table["spec"]), int(table["seed"])
    if table["how"] is None:
        return initial(base, spec, seed).tensors
    samples = None if table["data"] is None else _samples(base, name, table["data"], table["task"])
    return make_start(table["how"], base, spec, seed, samples).tensors


def _samples(base: Base, name: str, origin: Table, described: Table) -> Samples:
    from fedpeft.adapters.starts import Samples
    from fedpeft.tasks import TASKS, Source, read_rows

    task, source = configs.build(TASKS, described, "task"), Source.model_validate(origin)
    rows = [row for row in read_rows(source) if row.get("task", name) == name]
    if not rows:
        raise DataError(f"start.data: {source.label} holds no row of task {name!r}; its column `task` must name the federation's tasks")
    return Samples(task, task.encode(rows, base))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ANSWERS: dict[str, Callable[[Table], bytes]] = {
    "lay": lambda question: json.dumps({**lay(question), remembered.SOURCES: remembered.loaded()}).encode(),
    "begin": begin,
}
"""What a process of its own can be asked."""
