"""Test rows of a site answered by the shared adapter alone, with the site's private pair at full weight, and weighed row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.routing.nearness import Nearness
from fedpeft.tasks.arrange import subset
from fedpeft.tensors import Tensors
from fedpeft.update import Counters, add_counters
from fedpeft_client.config import SiteConfig
from fedpeft_client.serve.own import Own

if TYPE_CHECKING:
    from fedpeft.adapters import Adapter
    from fedpeft.adapters.live import Live
    from fedpeft.bases import Base
    from fedpeft.registry import Library
    from fedpeft.service import Service
    from fedpeft.tasks import Encoded, Task

HOW = ("shared", "private", "weighed")


@dataclass(frozen=True)
class Scored:
    """One task: test rows, their mean weight, and scores by name under each of `HOW`."""

    task: str
    rows: int
    weight: float
    scores: Mapping[str, Mapping[str, float]]


def score(site: SiteConfig, registry: Library) -> list[Scored]:
    """All tasks of the site that are served and that training left a private pair of.

    Raises:
        AdapterError: there is no such task, or the registry is empty.
        BaseError: the base at hand is another one than the adapters were trained on.
        DataError: the site's rows cannot be read.
    """
    from fedpeft.service import Service

    service, own = Service.open(registry, site.base.quantization), Own(site)
    found = []
    for task in sorted(site.data.keys() & service.versions.keys()):
        adapter = service.registry.load(service.versions[task].digest)
        pair = own.adapter(adapter)
        if pair is not None:
            found.append(_scored(service, own, adapter, pair.tensors))
    if not found:
        raise AdapterError(
            f"site {site.name}: training left no private pair of a served task; tasks of [data] are {sorted(site.data)}, served are "
            f"{sorted(service.versions)}; train with scheme.kind = 'feddpa' and method.extra, or use fedpeft evaluate"
        )
    return found


def _scored(service: Service, own: Own, adapter: Adapter, pair: Tensors) -> Scored:
    from fedpeft.adapters import attach

    task, base = service.tasks[adapter.spec.task], service.base
    rows, data = own.shelf.rows(task.name, "test"), own.shelf.encoded(task, "test", base)
    near = Nearness(base.embed(own.texts(task)), own.site.serve.own_scale)
    weights = np.round([near.weight(vector) for vector in base.embed([task.text_of(row) for row in rows])], 2)
    by = {"shared": np.zeros(len(rows)), "private": np.ones(len(rows)), "weighed": weights}
    with attach(base, adapter.spec) as live:
        counters = {how: _counters((live, base), (adapter.tensors, pair), (task, data), by[how]) for how in HOW}
    scores = {how: task.scores(mine) | _loss(mine) for how, mine in counters.items()}
    return Scored(task.name, len(rows), float(np.mean(weights)), scores)


def _loss(counters: Counters) -> dict[str, float]:
    """The mean per label or token, which moves before any answer does."""
    return {"loss": counters["loss"][0] / max(counters["count"][0], 1.0)}


def _counters(on: tuple[Live, Base], of: tuple[Tensors, Tensors], what: tuple[Task, Encoded], weights: NDArray[np.float64]) -> Counters:
    """Rows of one weight, to a hundredth, together; a weight multiplies B2."""
    (live, base), (shared, pair), (task, data) = on, of, what
    total: Counters = {}
    for weight in np.unique(weights):
        own = Tensors(pair.layout, pair.flat.copy())
        own.flat[pair.layout.role_spans["B2"]] *= np.float32(weight)
        live.load(shared.patch(own))
        rows = subset(data, np.flatnonzero(weights == weight), indexed=task.head.kind == "lm")
        total = add_counters(total, task.evaluate(live.model, rows, base))
    return total
