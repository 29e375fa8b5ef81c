"""The roster: every site that ever said hello, what it holds, and whether rounds may count on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fedpeft import __version__
from fedpeft.errors import CohortError
from fedpeft.wire.pacing import pause
from fedpeft.wire.v1.federation_pb2 import Capabilities
from fedpeft_coordinator.collecting import GAVE_UP, RESTS, Report, line
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import Round, Site
from fedpeft_coordinator.transport import Transport

POLL_SECONDS = 0.2
LEAST_REST, LONGEST_REST = 60.0, 86_400.0
"""Seconds after which a site that rests is asked again, whatever it said."""


class Roster:
    """Sites by name. A site that is known but not connected is still counted on, until it lets a deadline pass.

    So a site that is restarted while a round is planned takes part in that round as if nothing had happened.
    """

    def __init__(self, setup: Setup, journal: Journal, transport: Transport, events: Events) -> None:
        self._setup, self._journal, self._transport, self._events = setup, journal, transport, events
        self.sites: dict[str, Site] = journal.sites()
        self.connected: set[str] = set()
        self._met: set[str] = set()
        self._changed: set[str] = set()
        self._chose: frozenset[str] = frozenset()
        self._tried: dict[int, int] = {}
        self._left_out: dict[int, dict[str, frozenset[str]]] = {}
        self._rests: dict[str, float] = {}

    def refresh(self) -> dict[str, Site]:
        """Take in who is connected now."""
        seen = {name: self._merge(self._judge(name, given)) for name, given in self._transport.sites().items()}
        for name in seen.keys() - self.connected:
            self._events("site", site=name, tasks=dict(seen[name].train), device=seen[name].device, refused=seen[name].refused)
        self.connected = set(seen)
        self._met |= self.connected
        self._keep(seen.values())
        self.flush()
        return self.sites

    def wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Refresh until ``ready``. Raises `CohortError` after the cohort's deadline, saying ``what`` was missing, but for who rests."""
        began = time.monotonic()
        while True:
            self.refresh()
            if ready():
                return
            if any(map(self.rests, self.sites)):
                began = time.monotonic()
            if time.monotonic() >= began + self._setup.limits.deadline:
                raise CohortError(
                    f"{what()} within {self._setup.limits.deadline:g} s (cohort.deadline); start more sites with "
                    "`fedpeft client join SITE.toml` and run the same command again"
                )
            time.sleep(pause(time.monotonic() - began, POLL_SECONDS))

    def rests(self, site: str) -> bool:
        """Whether ``site`` said that its policy allows nothing now."""
        return time.monotonic() < self._rests.get(site, 0.0)

    @property
    def present(self) -> list[Site]:
        """Sites that are connected and may be asked."""
        return [site for name, site in self.sites.items() if name in self.connected and site.usable]

    @property
    def expected(self) -> list[Site]:
        """Sites that are `present`, and those known that may come back: they have not been here since this coordinator was started."""
        return [site for name, site in self.sites.items() if site.usable and (name in self.connected or name not in self._met)]

    def left_out(self, number: int) -> Mapping[str, frozenset[str]]:
        """Sites by task that gave up in an earlier attempt of round ``number``."""
        return self._left_out.get(number, {})

    def leave_out(self, done: Round) -> int:
        """Take in who gave up in ``done``, so that what hindered one site hinders not all of them; answers how often it was tried.

        A coordinator that is started again begins to count anew; an attempt in which a site rested counts for nothing.
        """
        before = self.left_out(done.number)
        gave_up = {name: frozenset(site for site, why in row.drops.items() if why.startswith(GAVE_UP)) for name, row in done.tasks.items()}
        self._left_out = {done.number: {name: sites | before.get(name, frozenset()) for name, sites in gave_up.items()}}
        rested = any(why.startswith(RESTS) for row in done.tasks.values() for why in row.drops.values())
        self._tried = {done.number: self._tried.get(done.number, 0) + (not rested)}
        return self._tried[done.number]

    def note(self, report: Report, trained: bool = False) -> None:
        """Take in what an answer, to whom was asked to train (``trained``) or not, said of its site; `flush` brings it to the journal."""
        site = self.sites.get(report.site)
        if site is None:
            return
        loads = site.base_loads if report.base_loads is None else report.base_loads
        unfit = (*site.unfit, *sorted(set(report.unfit) - set(site.unfit))) if trained else site.unfit
        changed = replace(site, have={**site.have, **report.have}, base_loads=loads, vanished=report.vanished, unfit=unfit)
        if report.vanished:
            self.connected.discard(site.name)
        if report.rests is not None:
            seconds = min(max(report.rests, LEAST_REST), LONGEST_REST)
            self._rests[site.name] = time.monotonic() + seconds
            self._events("resting", site=site.name, seconds=round(seconds))
        self._keep([changed])

    @property
    def undecided(self) -> bool:
        """Whether a site is connected that holds clusters and was not asked, when others last were, which of them it takes."""
        return any(self._clusters(site) and site.name not in self._chose for site in self.present)

    def passes(self, passed: Mapping[str, tuple[str, ...]]) -> None:
        """Take in which clusters the sites do not take that were asked now."""
        self._chose = frozenset(passed)
        self._keep(replace(self.sites[name], passes=tasks) for name, tasks in passed.items())
        self.flush()

    def _keep(self, sites: Iterable[Site]) -> None:
        for site in sites:
            if self.sites.get(site.name) != site:
                self.sites[site.name] = site
                self._changed.add(site.name)

    def flush(self) -> None:
        """Write what changed to the journal."""
        if self._changed:
            self._journal.save_sites(self.sites[name] for name in sorted(self._changed))
            self._changed.clear()

    def _merge(self, said: Site) -> Site:
        """What a site said in its hello, with what its answers said since, unless its worker was restarted in between.

        Clusters of rows that are new here it takes none of before it was asked which.
        """
        known = self.sites.get(said.name)
        if known is None:
            return replace(said, passes=self._clusters(said))
        said = replace(said, passes=(*known.passes, *(task for task in self._clusters(said) if task not in self._clusters(known))))
        if known.instance != said.instance or not said.instance:
            self._rests.pop(said.name, None)
            return said
        return replace(said, have={**said.have, **known.have}, base_loads=max(said.base_loads, known.base_loads), unfit=known.unfit)

    def _clusters(self, site: Site) -> tuple[str, ...]:
        return tuple(task for task in self._setup.tasks if task in self._setup.clusters and site.train.get(task, 0) > 0)

    def _judge(self, name: str, given: Capabilities) -> Site:
        held = {one.task: one for one in given.holdings}
        mine = {task: held[rows] for task, setup in self._setup.tasks.items() if (rows := setup.rows or task) in held}
        blind = self._setup.task_blind
        return Site(
            name=name,
            train={task: 1 if blind else int(one.train_examples) for task, one in mine.items()},
            test={task: 1 if blind else int(one.test_examples) for task, one in mine.items()},
            have={task: one.adapter_digest for task, one in mine.items() if one.task == task and one.adapter_digest},
            instance=given.instance,
            base_loads=int(given.base_loads),
            device=line(given.device),
            quantization=line(given.quantization),
            refused=_refusal(given, self._setup.identity),
        )


def _refusal(given: Capabilities, identity: str) -> str:
    """Why a site cannot take part, or an empty string."""
    if given.version and minor(given.version) != minor(__version__):
        return f"runs fedpeft {line(given.version)}, the coordinator {__version__}; install the same minor version on both sides"
    if identity and given.base_identity and given.base_identity != identity:
        return (
            f"holds base {line(given.base_identity[:12])}, the federation trains on {identity[:12]}; "
            "get the same weights and tokenizer there"
        )
    return ""


def minor(version: str) -> list[str]:
    """The first two numbers of a version."""
    return version.split(".")[:2]
