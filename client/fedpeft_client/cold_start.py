"""A task that no site trained yet: which served adapters are near this site's rows, and the mixture of them that it may start from.

Rows stay here: what a person hands to the coordinator are names and at most 20 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.errors import AdapterError, DataError
from fedpeft.routing import FewShot, Request, Route, make_router
from fedpeft.routing.fewshot import nearest
from fedpeft.tasks import read_rows
from fedpeft_client.config import SiteConfig

if TYPE_CHECKING:
    from fedpeft.adapters import Adapter
    from fedpeft.registry import Library
    from fedpeft.service import Service
    from fedpeft.tasks import Encoded, Row, Task
    from fedpeft.update import Counters

FEW = 200
"""Below so many rows weights are all that can be learned; above, the task trains an adapter of its own from the mixture."""


@dataclass(frozen=True)
class Proposal:
    """The mixture, from ``rows`` rows: by their mean embedding, or ``fitted`` to their loss."""

    task: str
    rows: int
    route: Route
    fitted: bool


def propose(site: SiteConfig, task: Task, registry: Library, fit: bool = False) -> Proposal:
    """The mixture of ``registry``'s served adapters for the site's rows of ``task`` (FedDPA and LORAUTER route single requests alike).

    Raises:
        DataError: the site holds no rows of the task.
        AdapterError: the registry is empty, its versions have no router cards, or the task has labels, which no other adapter knows.
        BaseError: the base at hand is another one than the adapters were trained on.
    """
    from fedpeft.service import Service

    if task.name not in site.data:
        raise DataError(f"task {task.name!r}: site {site.name} holds no rows of it; tasks of [data] are {sorted(site.data)}")
    rows = read_rows(site.data[task.name], "train")[:FEW]
    service = Service.open(registry, site.base.quantization)
    centre = service.encoder.embed([task.text_of(row) for row in rows]).mean(axis=0)
    route = make_router("centroid3", service.cards).route(Request.of(centre, service.named_encoder))
    return Proposal(task.name, len(rows), _fitted(service, task, rows, route) if fit else route, fit)


def _fitted(service: Service, task: Task, rows: list[Row], near: Route) -> Route:
    """The weights of the nearest adapters that make the rows likeliest, by search (LoraHub, Huang et al. 2023, arXiv 2307.13269)."""
    if task.head.kind != "lm":
        raise AdapterError(f"task {task.name}: no served adapter knows its labels, so there is no loss to fit; leave --fit out")
    names = nearest(near.scores)
    adapters = [service.registry.load(service.versions[name].digest) for name in names]
    data = task.encode(rows, service.base)

    def loss(weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        counters = _score(service, task, data, _mixed(adapters, weights.tolist()))
        return float(counters["loss"][0] / max(counters["count"][0], 1.0))

    found = FewShot().fit(names, loss)
    return found.route(Request())


def _mixed(adapters: list[Adapter], weights: list[float]) -> Adapter:
    from fedpeft.merging import make_rule, merge

    return merge(adapters, weights, make_rule("cat"))


def _score(service: Service, task: Task, data: Encoded, adapter: Adapter) -> Counters:
    from fedpeft.adapters import attach
    from fedpeft.training import evaluate

    with attach(service.base, adapter.spec) as live:
        live.load(adapter.tensors)
        return evaluate(live, task, data)
