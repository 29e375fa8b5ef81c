"""Which version of each task is served now, and the swap to the next one while requests run on the one they began with."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedpeft import config
from fedpeft.adapters import Adapter
from fedpeft.adapters.folder import digest_in, parse
from fedpeft.errors import AdapterError, BaseError, FedpeftError, LinkError, StorageError
from fedpeft.registry import Version, router_card
from fedpeft.registry.version import Head
from fedpeft.routing import RouterCard
from fedpeft.serving.requests import Mixture

if TYPE_CHECKING:
    from fedpeft.tasks import Task

log = logging.getLogger("fedpeft.serving")


class Source(Protocol):
    """Where versions come from: a `Registry`, or anything that answers like one."""

    def heads(self) -> Mapping[str, Head]:
        """Number and digest of each task's current version."""
        ...

    def get(self, ref: str) -> Version:
        """A task's current version."""
        ...

    def files(self, digest: str) -> dict[str, bytes]:
        """All files of a version, verified."""
        ...


class Host(Protocol):
    """Where adapters are put to work; its methods may wait for the engine."""

    def put(self, name: str, adapter: Adapter) -> None:
        """Add an adapter. Raises `AdapterError` when it cannot be served."""
        ...

    def remove(self, name: str) -> None:
        """Take one away."""
        ...


@dataclass(frozen=True)
class Served:
    """A version at work: ``name`` (``task@number``) is what the bank calls it."""

    name: str
    version: Version
    task: Task
    card: RouterCard


@dataclass
class Swaps:
    """How often a version was swapped in, taken out, or could not be served."""

    loaded: int = 0
    retired: int = 0
    refused: int = 0


@dataclass
class Catalog:
    """The served versions over ``base`` (its identity); names in use are counted, and a version leaves when its last request has ended."""

    source: Source
    base: str
    host: Host
    swaps: Swaps = field(default_factory=Swaps)
    faults: dict[str, str] = field(default_factory=dict)
    """Task -> why its newest version is not served."""

    def __post_init__(self) -> None:
        self._served: dict[str, Served] = {}
        self._cards: dict[str, RouterCard] = {}
        self._uses: Counter[str] = Counter()
        self._retired: set[str] = set()
        self._routers: dict[str, RouterCard] = {}
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._seen: dict[str, Head] = {}
        self.generation = 0

    def served(self) -> dict[str, Served]:
        """Task -> what is served now."""
        with self._lock:
            return dict(self._served)

    def cards(self) -> dict[str, RouterCard]:
        """Task -> router card of what is served now."""
        return {task: served.card for task, served in self.served().items()}

    def routers(self) -> dict[str, RouterCard]:
        """The trained routers over other tasks' adapters of versions that no mixed batch can hold, by their task."""
        with self._lock:
            return dict(self._routers)

    def find(self, task: str) -> Served:
        """What serves ``task``. Raises `AdapterError` naming what is served, or why the task is not."""
        with self._lock:
            if task in self._served:
                return self._served[task]
            if task in self.faults:
                raise AdapterError(f"task {task!r} is not served here: {self.faults[task]}")
            raise AdapterError(f"task {task!r} is not served here; tasks are {sorted(self._served)}")

    def take(self, shares: Mapping[str, float]) -> Mixture:
        """The current names of tasks with their weights, held until `release`. Raises `AdapterError` as `find`."""
        for task in shares:
            self.find(task)
        with self._lock:
            mixture = {self._served[task].name: weight for task, weight in shares.items()}
            self._uses.update(mixture.keys())
        return mixture

    def card(self, name: str) -> RouterCard:
        """The router card of a version that is held."""
        with self._lock:
            return self._cards[name]

    def share(self, mixture: Mixture) -> Mixture:
        """Hold once more what is held already, whatever has been published since."""
        with self._lock:
            self._uses.update(mixture.keys())
        return mixture

    def release(self, mixture: Mixture) -> None:
        """A request that held ``mixture`` has ended. Any thread, never waits."""
        with self._lock:
            self._uses.subtract(mixture.keys())

    def refresh(self) -> list[str]:
        """Bring in every task's new version; one that cannot be served leaves the old one at work. Returns the names swapped in."""
        with self._refreshing:
            return [name for task, head in self.source.heads().items() if self._seen.get(task) != head and (name := self._refresh(task))]

    def sweep(self) -> None:
        """Take out the retired versions that nobody uses any more."""
        with self._lock:
            names = [name for name in self._retired if self._uses[name] <= 0]
            for name in names:
                self._retired.discard(name)
                del self._uses[name], self._cards[name]
        for name in names:
            self.host.remove(name)
            self.swaps.retired += 1

    def _refresh(self, task: str) -> str | None:
        try:
            version = self.source.get(task)
            self._seen[task] = (version.number, version.digest)
            self._bring(task, version)
        except FedpeftError as fault:
            if isinstance(fault, StorageError | LinkError):
                self._seen.pop(task, None)  # what could not be read now may be read the next time
            self._refuse(task, str(fault).splitlines()[0])
            return None
        self.faults.pop(task, None)
        return f"{task}@{version.number}"

    def _refuse(self, task: str, cause: str) -> None:
        if self.faults.get(task) != cause:
            self.faults[task] = cause
            self.swaps.refused += 1
            log.warning("task %s: its newest version is not served: %s", task, cause)

    def _bring(self, task: str, version: Version) -> None:
        files = self.source.files(version.digest)
        adapter = _adapter(files, version)
        served = self._made(version)
        try:
            self.host.put(served.name, adapter)
        except AdapterError:
            self._advised(task, served.card)
            raise
        with self._lock:
            self._routers.pop(task, None)
            old = self._served.get(task)
            self._served[task], self._cards[served.name] = served, served.card
            self.generation += 1
            if old is not None:
                self._retired.add(old.name)
        self.swaps.loaded += 1
        log.info("task %s: serving %s (sha256:%s)", task, served.name, version.digest[:12])

    def _advised(self, task: str, card: RouterCard) -> None:
        """What cannot be served may hold a router over what is."""
        if card.learned is not None:
            with self._lock:
                self._routers[task] = RouterCard(learned=card.learned)
                self.generation += 1

    def _made(self, version: Version) -> Served:
        from fedpeft.tasks import TASKS

        manifest = version.manifest
        if manifest.base != self.base:
            raise BaseError(
                f"{version.task}@{version.number} was trained on base {manifest.base[:12]}, the base served here is {self.base[:12]}"
            )
        try:
            built: Task = config.build(TASKS, manifest.task_settings, f"task {version.task}")
        except ValueError as fault:
            raise AdapterError(f"{version.task}@{version.number}: its task cannot be built: {fault}") from None
        return Served(f"{version.task}@{version.number}", version, built, router_card(self.source, version.digest))


def _adapter(files: Mapping[str, bytes], version: Version) -> Adapter:
    adapter = parse(files, f"{version.task}@{version.number}")
    seen = digest_in(files)
    if seen != version.manifest.adapter:
        raise StorageError(f"{version.task}@{version.number}: holds adapter {seen[:12]}, its manifest says {version.manifest.adapter[:12]}")
    return adapter
