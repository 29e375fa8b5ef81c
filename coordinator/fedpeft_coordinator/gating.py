"""PHATGOOSE gates before a version is published: sites train them beside the frozen adapter, the coordinator sees their weighted sums.

They travel as counters of an evaluation, in the clear or under masks: ``gate.<module>`` (n,) weighted by the site's share of rows, its
``gate.weight``, and ``score.<router>``, histograms of the training rows' scores, from which routers know when to abstain.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ConfigError
from fedpeft.routing import BINS, Card, RouterCard, derive
from fedpeft.routing.cardfile import lora_modules
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Counters
from fedpeft.wire.masking import MAX_COUNTERS, MAX_VALUES
from fedpeft.wire.v1.federation_pb2 import Gates
from fedpeft_coordinator import gathering, spreads
from fedpeft_coordinator.exchange import Around
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.scoring import part
from fedpeft_coordinator.secure import Secure
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.store import Store

Arrays = dict[str, NDArray[Any]]
GATE, SCORE, WEIGHT = "gate.", "score.", "gate.weight"
BESIDE = 8
"""Counters beside the gates."""


def check(layout: Layout) -> None:
    """Refuse to promise gates that cannot be trained or sent.

    Raises:
        ConfigError: the method has no LoRA modules, or more values than sites may send.
    """
    modules = lora_modules(layout)
    if not modules:
        raise ConfigError("routing.gates = true needs method.kind = 'lora', whose layers a gate opens; set gates = false")
    total = sum(modules.values())
    if len(modules) + BESIDE > MAX_COUNTERS or total + BESIDE * BINS > MAX_VALUES:
        raise ConfigError(
            f"routing.gates = true and method.targets: {len(modules)} gates of {total} values in all, at most {MAX_COUNTERS - BESIDE} of "
            f"{MAX_VALUES - BESIDE * BINS} can be sent; target fewer modules, or set gates = false"
        )


def gated(done: Round, names: Collection[str], writer: Writer, around: Around, secure: Secure | None, store: Store) -> Round:
    """``done`` with the gates of the tasks ``names``, of those whose sites sent any. Raises `LinkError`."""
    found = _train(replace(done, tasks={name: done.tasks[name] for name in names}), writer, around, secure)
    around.events("gated", round=done.number, tasks={name: sum(map(_is_gate, arrays)) for name, arrays in found.items()})
    return done.at("gated", **{name: replace(done.tasks[name], gates=store.put_arrays(arrays)) for name, arrays in found.items()})


def _train(done: Round, writer: Writer, around: Around, secure: Secure | None) -> dict[str, Arrays]:
    around.roster.refresh()
    wanted = replace(writer, gates=Gates(steps=writer.setup.routing.steps, lr=writer.setup.routing.lr))
    able = {name: tuple(site.name for site in around.roster.present if site.trains(name)) for name in done.tasks}
    if secure is not None:
        counters: Mapping[str, Counters] = secure.score(done, able, wanted)
    else:
        counters = gathering.score(done, able, wanted, around)
    return {name: found for name, mine in counters.items() if (found := mean(mine, writer.setup.tasks[name].layout))}


def mean(counters: Counters, layout: Layout) -> Arrays:
    """``gate.<module>`` and ``score.<router>`` of summed counters; nothing when a gate is missing, of another size, or without weight."""
    weight = sum(counters.get(WEIGHT, ()))
    modules = lora_modules(layout)
    if not weight > 0.0 or any(len(counters.get(GATE + module, ())) != size for module, size in modules.items()):
        return {}
    gates = {GATE + module: (np.array(counters[GATE + module], np.float64) / weight).astype(np.float32) for module in modules}
    scores = {SCORE + router: np.array(values, np.float64) for router, values in part(counters, SCORE).items()}
    return gates | {name: values for name, values in scores.items() if len(values) == BINS and (values >= 0).all()}


def router_card(row: TaskRound, tensors: Tensors, store: Store) -> RouterCard | None:
    """The router card of a task with gates or second moments; None leaves it to what follows from the adapter alone."""
    if not (row.gates or row.moments):
        return None
    arrays = store.arrays(row.gates) if row.gates else {}
    gates = {name.removeprefix(GATE): values for name, values in arrays.items() if _is_gate(name)}
    counts = {name.removeprefix(SCORE): tuple(values.tolist()) for name, values in arrays.items() if name.startswith(SCORE)}
    card = derive(tensors, None if row.card is None else Card.from_json(row.card), gates, counts)
    return spreads.added(card, store.arrays(row.moments)) if row.moments else card


def _is_gate(name: str) -> bool:
    return name.startswith(GATE)
