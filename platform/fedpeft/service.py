"""Service: a registry's served adapters on one warm base; routes a request, answers it, scores rows.

What ``fedpeft route`` and ``fedpeft evaluate`` call. One base is loaded once, adapters are attached one at a time, or as one mixture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedpeft import config
from fedpeft.errors import AdapterError, BaseError, DataError
from fedpeft.registry import Library, Version
from fedpeft.routing import Request, Route, Router, RouterCard, make_router
from fedpeft.routing.cards import common_encoder
from fedpeft.routing.policies import token_router
from fedpeft.update import Counters, add_counters

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.adapters import Adapter
    from fedpeft.bases import Base, BaseSpec, Encoder
    from fedpeft.mixtures import Bank
    from fedpeft.tasks import Row, Task

DEFAULT = "chain"
"""The router of a service that is told none."""


@dataclass(frozen=True)
class Service:
    """The served version of each task, its task and its router card, over one loaded base."""

    base: Base
    registry: Library
    versions: dict[str, Version]
    tasks: dict[str, Task]
    cards: dict[str, RouterCard]

    @staticmethod
    def open(registry: Library, quantization: str = "none") -> Service:
        """Load the base that the registry's adapters were trained on; of a far registry only what answers is pulled.

        Raises:
            AdapterError: the registry is empty.
            BaseError: the base at hand is another one than the adapters were trained on.
            StorageError: a router card is damaged.
            LinkError, PolicyError: a far registry cannot be reached, or refuses.
        """
        from fedpeft.tasks import TASKS

        served = registry.served()
        versions = {task: version for task, (version, _) in sorted(served.items())}
        base = load_base_of(versions, quantization)
        tasks: dict[str, Task] = {
            name: config.build(TASKS, version.manifest.task_settings, f"task {name}") for name, version in versions.items()
        }
        return Service(base, registry, versions, tasks, {name: served[name][1] for name in versions})

    def renewed(self, versions: dict[str, Version], cards: dict[str, RouterCard]) -> Service:
        """Other versions of the tasks over the same base; what embeds stays loaded where their cards name the same."""
        found = replace(self, versions=versions, cards=cards)
        if "encoder" in vars(self) and found.named_encoder == self.named_encoder:
            vars(found)["encoder"] = self.encoder
        return found

    def router(self, kind: str = DEFAULT) -> Router:
        """The router ``kind`` over the served adapters. Raises `AdapterError` when there is none, or their cards lack what it needs."""
        return make_router(kind, self.cards)

    def request(self, text: str, task: str | None = None) -> Request:
        """``text`` as routers see it: embedded by what the router cards were made with, and read by the base, when first looked at."""
        modules = sorted({module for card in self.cards.values() for module in card.watched})
        return Request(task, lambda: self.encoder.embed([text])[0], lambda: self.base.watch(text, modules), self.named_encoder, text)

    def route(self, text: str, task: str | None = None, router: str = DEFAULT) -> Route:
        """Where ``text`` goes: the named task, or what ``router`` makes of it. Raises `AdapterError` when either is unknown."""
        return self.router("task" if task is not None else router).route(self.request(text, task))

    def answer(self, text: str, route: Route) -> str | None:
        """The answer of the route's mixture to ``text``; the base's own where it generates text, else None."""
        if route.task is None:
            return self._base_answer(text)
        with self._acting(route) as model:
            return self.tasks[route.task].answer(model, self.base, text)

    def evaluate(self, rows: Sequence[Row], router: str | None = DEFAULT) -> dict[str, dict[str, Any]]:
        """Score rows per task, each answered by what ``router`` sends it to; by its own task's adapter with None.

        A row of a classification task that goes elsewhere has no label there and is left out of the scores; text has a likelihood under
        any mixture, and under the base.

        Returns:
            Per task: number of rows, shares ``routed right`` (their own task weighs most) and ``to the base``, how many were ``scored``,
            and the scores.
        """
        groups = self._by_task(rows)
        return {name: self._evaluate(name, group, router or "task") for name, group in groups.items()}

    @cached_property
    def named_encoder(self) -> str:
        """What the router cards say embedded their texts. Raises `AdapterError` when they differ."""
        return common_encoder({name: card.card for name, card in self.cards.items() if card.card is not None})

    @cached_property
    def encoder(self) -> Encoder:
        """What embeds requests, as the cards name it: the base, a small encoder, or both. Raises `BaseError` when it is not here."""
        from fedpeft.bases import load_encoder

        return load_encoder(self.named_encoder, self.base)

    def _evaluate(self, name: str, rows: list[Row], kind: str) -> dict[str, Any]:
        task, router = self.tasks[name], self.router(kind)
        routes = [router.route(self.request(task.text_of(row), name if kind == "task" else None)) for row in rows]
        scored = [pair for pair in zip(rows, routes, strict=True) if task.head.kind == "lm" or pair[1].task == name]
        counters: Counters = {}
        for pairs in _alike(scored, apart=task.head.kind != "lm"):
            counters = add_counters(counters, self._counters(name, [row for row, _ in pairs], pairs[0][1]))
        return {
            "rows": len(rows),
            "routed right": sum(route.task == name for route in routes) / len(rows),
            "to the base": sum(route.task is None for route in routes) / len(rows),
            "scored": len(scored),
            "scores": task.scores(counters) if counters else {},
        }

    def _counters(self, name: str, rows: list[Row], route: Route) -> Counters:
        """Counters of rows that all go the same way."""
        task = self.tasks[name]
        data = task.encode(rows, self.base)
        if route.task is None:
            return task.evaluate(self.base.shell(task.head), data, self.base)
        with self._acting(route) as model:
            return task.evaluate(model, data, self.base)

    def _base_answer(self, text: str) -> str | None:
        found = next((task for _, task in sorted(self.tasks.items()) if task.head.kind == "lm"), None)
        return found.answer(self.base.shell(found.head), self.base, text) if found is not None else None

    def _by_task(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        only = next(iter(self.versions)) if len(self.versions) == 1 else None
        groups: dict[str, list[Row]] = {}
        for place, row in enumerate(rows, 1):
            name = row.get("task", only)
            if name not in self.versions:
                raise DataError(f"row {place}: task {name!r} has no adapter; add a `task` column with one of {sorted(self.versions)}")
            groups.setdefault(name, []).append(row)
        return groups

    @contextmanager
    def _acting(self, route: Route) -> Iterator[nn.Module]:
        """The model under the route's mixture: one adapter, or, where every token chooses, a bank of all of them."""
        from fedpeft.adapters import attach

        if route.level == "token":
            with self._bank(route) as bank:
                yield bank.model
            return
        adapter = self._mixed(route)
        with attach(self.base, adapter.spec) as live:
            live.load(adapter.tensors)
            yield live.model

    def _bank(self, route: Route) -> Bank:
        from fedpeft.mixtures import Bank
        from fedpeft.mixtures.routers import routed

        assert route.task is not None
        router, head = token_router(route.router, self.cards), self.tasks[route.task].head
        bank = Bank.attach(self.base, head, {name: self.registry.load(self.versions[name].digest) for name in router.names})
        bank.use(routed(router, self.base.device), heads=None if head.kind == "lm" else [route.task])
        return bank

    def _mixed(self, route: Route) -> Adapter:
        """The route's mixture as one adapter, exactly: ``sum_e w_e B_e A_e`` by stacked ranks; labels have no mixture, so the first's."""
        from fedpeft.merging import make_rule, merge

        assert route.task is not None
        first = self.registry.load(self.versions[route.task].digest)
        if route.weights == {route.task: 1.0}:
            return first
        others = {name: self.registry.load(self.versions[name].digest) for name in sorted(route.weights)}
        kept = {name: adapter for name, adapter in others.items() if adapter.spec.head == first.spec.head}
        return merge(list(kept.values()), [route.weights[name] for name in kept], make_rule("cat"), task=route.task)


def _alike(pairs: Sequence[tuple[Row, Route]], apart: bool) -> Collection[list[tuple[Row, Route]]]:
    """Rows by where they go: those whose tokens choose all together, or each ``apart`` where a head must be named for every row."""
    groups: dict[Any, list[tuple[Row, Route]]] = {}
    for place, (row, route) in enumerate(pairs):
        key = (route.router, place if apart else None) if route.level == "token" else tuple(sorted(route.weights.items()))
        groups.setdefault(key, []).append((row, route))
    return groups.values()


def base_of(versions: Mapping[str, Version], quantization: str = "none") -> BaseSpec:
    """The base that ``versions`` were trained on; it cuts texts where the longest were cut. Raises `AdapterError` when there are none."""
    from fedpeft.bases import BaseSpec

    if not versions:
        raise AdapterError("the registry holds no version yet; run a federation first, push a version to it, or give --registry of another")
    manifests = [version.manifest for version in versions.values()]
    told = max(manifest.max_tokens for manifest in manifests)
    return BaseSpec(manifests[0].base_model, quantization, max_tokens=told or BaseSpec.max_tokens)  # type: ignore[arg-type]


def load_base_of(versions: Mapping[str, Version], quantization: str = "none") -> Base:
    """The base of `base_of`, loaded. Raises `AdapterError` when there are no versions, `BaseError` when it is another one here."""
    from fedpeft.bases import load_base

    base = load_base(base_of(versions, quantization))
    _same_base(base, versions)
    return base


def _same_base(base: Base, versions: Mapping[str, Version]) -> None:
    for name, version in versions.items():
        if version.manifest.base != base.fingerprint.identity:
            raise BaseError(
                f"{name}@{version.number} was trained on base {version.manifest.base[:12]}, {version.manifest.base_model} here is "
                f"{base.fingerprint.identity[:12]}; get the same weights and tokenizer"
            )
