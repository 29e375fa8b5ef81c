"""What is compared: a federation's tasks, the sites' rows, and how many examples each way of training may see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from fedpeft import config
from fedpeft.bases.spec import BaseSpec
from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks import Source
from fedpeft.training.outline import Outline

if TYPE_CHECKING:
    from fedpeft.methods import Method
    from fedpeft.tasks import Row, Task
    from fedpeft.training import TrainSettings

MARK = "federation.toml"
"""The federation's file in the folder of a run; the sites' files lie beside it."""


class Site(BaseModel):
    """The parts of a site.toml that say what it holds; every other key is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    base: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Source] = Field(min_length=1)

    def spec(self) -> BaseSpec:
        """The base as the site holds it. Raises `ConfigError`."""
        return _spec(self.base, f"site {self.name}: base")


@dataclass(frozen=True)
class Plan:
    """One comparison; sites by name."""

    outline: Outline
    sites: Mapping[str, Site]

    @staticmethod
    def read(federation: Path, sites: Sequence[Path] = ()) -> Plan:
        """As `open`, of what all three arms can train.

        Raises:
            ConfigError: as `open`; or no site holds a task, or one arm alone could begin there.
        """
        plan = Plan.open(federation, sites)
        plan._check()
        return plan

    @staticmethod
    def open(federation: Path, sites: Sequence[Path] = ()) -> Plan:
        """The plan of a federation.toml and its sites' files; none: those beside it that have a table ``[data]``.

        Raises:
            ConfigError: a file is missing or has faults, or a name is there twice.
        """
        outline = config.parse(config.read_toml(federation), Outline, str(federation))
        found = [_site(path) for path in sites or beside(federation)]
        names = [site.name for site in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"sites {twice} are there twice; give each site's file once, and each a name of its own")
        return Plan(outline, {site.name: site for site in found})

    @staticmethod
    def of(folder: Path) -> Plan:
        """The plan whose files lie in ``folder``. Raises `ConfigError`."""
        return Plan.read(folder / MARK)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The federation's tasks."""
        return {name: self.outline.task(name) for name in self.outline.tasks}

    @cached_property
    def method(self) -> Method:
        """The method of every adapter."""
        return self.outline.adapter_method()

    @cached_property
    def base(self) -> BaseSpec:
        """What all three train on: the base as the sites hold it, or unquantized where they differ."""
        specs = {site.spec() for site in self.sites.values()}
        return specs.pop() if len(specs) == 1 else _spec({**self.outline.base, "quantization": "none"}, "base")

    def settings(self, task: str) -> TrainSettings:
        """One site's training of ``task`` in one round, without what holds sites together (FedProx), since no other arm has sites."""
        from dataclasses import replace

        return replace(self.outline.settings(task), proximal=0.0)

    def holders(self, task: str) -> list[str]:
        """The sites that hold rows of ``task``."""
        return [name for name, site in self.sites.items() if task in site.data]

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every (task, site) that holds rows."""
        return ((task, site) for task in self.tasks for site in self.holders(task))

    def steps(self, task: str, site: str | None) -> int:
        """Optimizer steps of ``task`` in the whole run: of one site, or of all sites together (None)."""
        return self.settings(task).steps * self.outline.rounds * (len(self.holders(task)) if site is None else 1)

    def examples(self, task: str) -> int:
        """Examples of ``task`` that every arm sees: rounds x local steps x batch x sites."""
        settings = self.settings(task)
        return self.steps(task, None) * settings.batch_size * settings.accumulate

    def rows(self, task: str, split: str, site: str | None = None) -> list[Row]:
        """Rows of one split at ``site``, or of all sites, one site's after another's.

        Raises:
            DataError: rows cannot be read, a site has none to train on, or nobody has any to test on.
        """
        from fedpeft.tasks import read_rows

        found: list[Row] = []
        for name in self.holders(task) if site is None else [site]:
            try:
                found += read_rows(self.sites[name].data[task], split)
            except DataError as fault:
                if split == "train":
                    raise DataError(f"site {name}, task {task}: {fault}") from None
        if not found:
            raise DataError(
                f"task {task}: no site holds rows of the split {split!r}; mark some in a column `split`, or leave that column out"
            )
        return found

    def _check(self) -> None:
        """Raise `ConfigError` for what no arm could train."""
        for name, table in self.outline.tasks.items():
            if "clusters" in table:
                raise ConfigError(
                    f"tasks.{name}.clusters: which rows belong together is found in rounds alone; compare declared tasks, remove the key"
                )
            self.outline.settings(name)
            if not self.holders(name):
                raise ConfigError(f"tasks.{name}: no site holds rows of it; add [data.{name}] to a site's file, or remove the task")
        if self.outline.start is not None or any("start" in table for table in self.outline.tasks.values()):
            raise ConfigError(
                "start: the federation alone would begin from it; remove start, so that all three begin from the same fresh adapters"
            )
        _ = self.tasks, self.method, self.base


def beside(federation: Path) -> list[Path]:
    """The files of sites in the folder of ``federation``, by name. Raises `ConfigError` when there is none."""
    found = [path for path in sorted(federation.parent.glob("*.toml")) if path.name != federation.name and "data" in config.read_toml(path)]
    if not found:
        raise ConfigError(
            f"{federation.parent}: no site's file beside {federation.name}; name them behind it: {federation.name} SITE.TOML ..."
        )
    return found


def _site(path: Path) -> Site:
    site = config.parse(config.read_toml(path), Site, str(path))
    return site.model_copy(update={"data": {task: source.rooted(path.resolve().parent) for task, source in site.data.items()}})


def _spec(table: Mapping[str, Any], noun: str) -> BaseSpec:
    known = {key: value for key, value in table.items() if key != "fingerprint"}
    try:
        return config.build({noun: BaseSpec}, {"model": "minilm", **known, "kind": noun}, noun)
    except ValueError as fault:
        raise ConfigError(str(fault)) from None
