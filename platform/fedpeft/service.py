"""Service: a registry's served adapters on one warm base; routes a request, answers it, scores rows.

What ``fedpeft route`` and ``fedpeft evaluate`` call. One base is loaded once, adapters are attached one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import config
from fedpeft.errors import AdapterError, BaseError, DataError
from fedpeft.registry import Registry, Version
from fedpeft.routing import Card, CentroidRouter, Route, TaskRouter

if TYPE_CHECKING:
    from fedpeft.bases import Base
    from fedpeft.tasks import Row, Task


@dataclass(frozen=True)
class Service:
    """The served version of each task, its task and its router card, over one loaded base."""

    base: Base
    registry: Registry
    versions: dict[str, Version]
    tasks: dict[str, Task]
    router: CentroidRouter

    @staticmethod
    def open(root: Path, quantization: str = "none") -> Service:
        """Load the base that the registry's adapters were trained on.

        Raises:
            AdapterError: the registry is missing or empty.
            BaseError: the base at hand is another one than the adapters were trained on.
        """
        from fedpeft.bases import BaseSpec, load_base
        from fedpeft.tasks import TASKS

        if not root.is_dir():
            raise AdapterError(f"{root}: no registry there; give --registry or set FEDPEFT_REGISTRY")
        registry = Registry(root)
        versions = {task: registry.get(task) for task in sorted({version.task for version in registry.list()})}
        if not versions:
            raise AdapterError(f"{root}: the registry holds no version yet; run a federation first")
        first = next(iter(versions.values())).manifest
        base = load_base(BaseSpec(model=first.base_model, quantization=quantization))  # type: ignore[arg-type]
        _same_base(base, versions)
        tasks: dict[str, Task] = {
            name: config.build(TASKS, version.manifest.task_settings, f"task {name}") for name, version in versions.items()
        }
        cards = {name: Card.from_json(version.manifest.card) for name, version in versions.items() if version.manifest.card}
        return Service(base, registry, versions, tasks, CentroidRouter(cards))

    def route(self, text: str, task: str | None = None) -> Route:
        """The task that ``text`` belongs to: the named one, or the nearest by its card. Raises `AdapterError` when unknown."""
        if task is not None:
            return TaskRouter(tuple(self.versions)).route(task)
        return self.router.route(self.base.embed([text])[0])

    def answer(self, text: str, task: str) -> str:
        """The answer of ``task``'s adapter to ``text``."""
        with self._live(task) as live:
            return self.tasks[task].answer(live.model, self.base, text)

    def evaluate(self, rows: Sequence[Row], routed: bool = True) -> dict[str, dict[str, Any]]:
        """Score rows per task; with ``routed`` a row only counts for its task when its text is routed there.

        Returns:
            Per task: number of rows, share routed to their own task, and the scores of the rows so answered.
        """
        groups = self._by_task(rows)
        return {name: self._evaluate(name, group, routed) for name, group in groups.items()}

    def _evaluate(self, name: str, rows: list[Row], routed: bool) -> dict[str, Any]:
        task = self.tasks[name]
        chosen = [self.router.route(vector).task for vector in self.base.embed([task.text_of(row) for row in rows])] if routed else []
        kept = [row for row, found in zip(rows, chosen, strict=True) if found == name] if routed else rows
        report: dict[str, Any] = {"rows": len(rows), "routed right": len(kept) / len(rows), "scores": {}}
        if kept:
            with self._live(name) as live:
                report["scores"] = task.scores(task.evaluate(live.model, task.encode(kept, self.base), self.base))
        return report

    def _by_task(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        only = next(iter(self.versions)) if len(self.versions) == 1 else None
        groups: dict[str, list[Row]] = {}
        for place, row in enumerate(rows, 1):
            name = row.get("task", only)
            if name not in self.versions:
                raise DataError(f"row {place}: task {name!r} has no adapter; add a `task` column with one of {sorted(self.versions)}")
            groups.setdefault(name, []).append(row)
        return groups

    def _live(self, task: str) -> Any:
        from fedpeft.adapters import attach

        adapter = self.registry.load(self.versions[task].digest)
        live = attach(self.base, adapter.spec)
        live.load(adapter.tensors)
        return live


def _same_base(base: Base, versions: dict[str, Version]) -> None:
    for name, version in versions.items():
        if version.manifest.base != base.fingerprint.identity:
            raise BaseError(
                f"{name}@{version.number} was trained on base {version.manifest.base[:12]}, {version.manifest.base_model} here is "
                f"{base.fingerprint.identity[:12]}; get the same weights and tokenizer"
            )
