"""What the demo trains, where, and with what: written once here, and from here into the TOML files of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.bases.spec import Quantization
from fedpeft.config import describe

if TYPE_CHECKING:
    from fedpeft.methods import Method
    from fedpeft.tasks import Source, Task
    from fedpeft.training import TrainSettings

TASKS = ("area", "effect", "error")
SITES = 3
QUANTIZATION: Quantization = "nf4"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Setting:
    """One demo run: its folder, how many rounds, the seed of everything, its tasks, and ``more`` tables of the federation's file."""

    folder: Path
    rounds: int = 6
    seed: int = 11
    tasks: tuple[str, ...] = TASKS
    more: dict[str, Any] = field(default_factory=dict)
    method_table: dict[str, Any] = field(default_factory=lambda: {"kind": "lora", "r": 8, "alpha": 16.0, "targets": ["attention"]})
    training_table: dict[str, Any] = field(default_factory=lambda: {"steps": 8, "batch_size": 16, "lr": 4e-3, "lr_by_role": {"head": 1e-2}})

    @property
    def sites(self) -> dict[str, list[str]]:
        """Site name -> groups of the standard library's packages that it holds."""
        from fedpeft.tasks.stdlib import sites

        return sites(SITES)

    def holders(self, task: str) -> list[str]:
        """The sites that hold rows of ``task``."""
        from fedpeft.tasks.stdlib import HOLDS

        return [site for site, clients in self.sites.items() if any(task in HOLDS[client] for client in clients)]

    def source(self, task: str, site: str | None = None) -> Source:
        """The rows of ``task`` at ``site``, or at all sites together."""
        from fedpeft.tasks import Source

        where: dict[str, Any] = {"task": task}
        return Source(package="stdlib", where=where if site is None else {**where, "client": self.sites[site]})

    def task(self, name: str) -> Task:
        """The task that ``name`` stands for."""
        from fedpeft.tasks import Classification
        from fedpeft.tasks.stdlib import STDLIB_LABELS

        return Classification(name, STDLIB_LABELS[name], metrics=("macro_f1", "accuracy"))

    @property
    def method(self) -> Method:
        """The adapter's method."""
        from fedpeft.config import build
        from fedpeft.methods import METHODS

        return build(METHODS, self.method_table, "method")

    @property
    def training(self) -> TrainSettings:
        """One round's local training."""
        from fedpeft.training import TrainSettings

        return TrainSettings(**self.training_table)

    def write(self, port: int) -> list[Path]:
        """Write federation.toml and one site.toml each; returns the paths, the federation's first."""
        import tomli_w

        self.folder.mkdir(parents=True, exist_ok=True)
        tables = {"federation": self._federation(port), **{site: self._site(site, port) for site in self.sites}}
        paths = []
        for name, table in tables.items():
            path = self.folder / f"{name}.toml"
            path.write_bytes(tomli_w.dumps(table).encode())
            paths.append(path)
        return paths

    def _federation(self, port: int) -> dict[str, Any]:
        return {
            "name": "stdlib-demo",
            "seed": self.seed,
            "rounds": self.rounds,
            "state": "coordinator",
            "base": {"model": "minilm", "max_tokens": MAX_TOKENS},
            "method": self.method_table,
            "scheme": {"kind": "alternating"},
            "training": self.training_table,
            "cohort": {"min_sites": 2, "wait_for_sites": SITES, "deadline": 300.0},
            "link": {"host": "127.0.0.1", "port": port},
            "tasks": {name: self._task(name) for name in self.tasks},
            **self.more,
        }

    def _task(self, name: str) -> dict[str, Any]:
        table = describe(self.task(name))
        return {key: table[key] for key in ("kind", "labels", "metrics")}

    def _site(self, site: str, port: int) -> dict[str, Any]:
        data = {task: self.source(task, site).model_dump(exclude_defaults=True) for task in self.tasks if site in self.holders(task)}
        return {
            "name": site,
            "coordinator": f"127.0.0.1:{port}",
            "state": site,
            "threads": 1,
            "base": {"model": "minilm", "quantization": QUANTIZATION, "max_tokens": MAX_TOKENS},
            "data": data,
        }

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every (task, site) that holds rows."""
        for task in self.tasks:
            for site in self.holders(task):
                yield task, site
