"""Test rows of a site answered by the shared adapter alone, with the site's private pair at full weight, and weighed row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.errors import AdapterError
from fedpeft.routing.nearness import Nearness
from fedpeft.tensors import Tensors
from fedpeft.update import Counters, add_counters
from fedpeft_client.config import SiteConfig
from fedpeft_client.serve.own import Own

if TYPE_CHECKING:
    from fedpeft.adapters import Adapter
    from fedpeft.registry import Library
    from fedpeft.service import Service
    from fedpeft.tasks import Row, Task

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
    task, base = service.tasks[adapter.spec.task], service.base
    rows = own.shelf.rows(task.name, "test")
    near = Nearness(base.embed(own.texts(task)), own.site.serve.own_scale)
    weights = [round(near.weight(vector), 2) for vector in base.embed([task.text_of(row) for row in rows])]
    by = {"shared": [0.0] * len(rows), "private": [1.0] * len(rows), "weighed": weights}
    counters = {how: _counters(service, task, (adapter, pair), list(zip(rows, by[how], strict=True))) for how in HOW}
    scores = {how: task.scores(mine) | _loss(mine) for how, mine in counters.items()}
    return Scored(task.name, len(rows), float(np.mean(weights)), scores)


def _loss(counters: Counters) -> dict[str, float]:
    """The mean per label or token, which moves before any answer does."""
    return {"loss": counters["loss"][0] / max(counters["count"][0], 1.0)}


def _counters(service: Service, task: Task, adapters: tuple[Adapter, Tensors], rows: Sequence[tuple[Row, float]]) -> Counters:
    """Rows of one weight, to a hundredth, together; a weight multiplies B2."""
    from fedpeft.adapters import attach

    (adapter, pair), groups = adapters, defaultdict[float, list["Row"]](list)
    total: Counters = {}
    for row, weight in rows:
        groups[weight].append(row)
    with attach(service.base, adapter.spec) as live:
        for weight, group in groups.items():
            own = Tensors(pair.layout, pair.flat.copy())
            own.flat[pair.layout.role_spans["B2"]] *= np.float32(weight)
            live.load(adapter.tensors.patch(own))
            total = add_counters(total, task.evaluate(live.model, task.encode(group, service.base), service.base))
    return total
