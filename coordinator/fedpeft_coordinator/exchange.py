"""One exchange: ask sites for tasks, judge the answers as they come, send whole what a site turned out to lack."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedpeft.wire import Envelope
from fedpeft_coordinator import collecting
from fedpeft_coordinator.collecting import Accept, Report
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.roster import Roster
from fedpeft_coordinator.setup import Limits
from fedpeft_coordinator.state import Round
from fedpeft_coordinator.transport import Transport

Asked = Mapping[str, tuple[str, ...]]
"""Tasks by site."""
Write = Callable[[str, tuple[str, ...], bool], Envelope]
"""The request to a site for some tasks; the flag asks for whole adapters."""
Drops = dict[str, dict[str, str]]
"""Reasons by task and site."""


@dataclass(frozen=True)
class Around:
    """The means of an exchange, the same for all kinds."""

    transport: Transport
    roster: Roster
    events: Events


@dataclass(frozen=True)
class Exchange:
    """What an exchange of one kind needs."""

    kind: str
    plan: Round
    write: Write
    accept: Accept
    limits: Limits

    def run(self, asked: Asked, around: Around) -> Drops:
        """Ask every site in ``asked``; returns who did not contribute to which task, and why.

        Raises:
            LinkError: the transport is gone for good.
        """
        end = time.monotonic() + self.limits.deadline
        drops: Drops = defaultdict(dict)
        lacking = self._pass(asked, False, end, drops, around)
        for site, tasks in self._pass(lacking, True, end, drops, around).items():
            for task in tasks:
                drops[task][site] = "failed: asks for the whole adapter again although it was sent"
        around.roster.flush()
        return {task: dict(sorted(sites.items())) for task, sites in drops.items()}

    def _pass(self, asked: Asked, whole: bool, end: float, drops: Drops, around: Around) -> Asked:
        """Ask once; returns the tasks that sites want sent whole."""
        if not asked:
            return {}
        requests = {site: self.write(site, tasks, whole) for site, tasks in asked.items()}
        lacking: dict[str, tuple[str, ...]] = {}
        for answer in around.transport.exchange(requests, max(end - time.monotonic(), 0.0), self.limits.retries):
            report = collecting.read(answer, self.plan, asked[answer.site], self.accept)
            around.roster.note(report, trained=self.kind == "train")
            for task, why in report.drops.items():
                drops[task][report.site] = why
            if report.missing:
                lacking[report.site] = report.missing
            self._tell(around.events, report, answer.seconds, requests[answer.site].size)
        return lacking

    def _tell(self, events: Events, report: Report, seconds: float, down: int) -> None:
        events(
            "answer",
            kind=self.kind,
            round=self.plan.number,
            site=report.site,
            outcomes=dict(report.outcomes),
            seconds=round(seconds, 3),
            train_seconds=round(report.seconds, 3),
            bytes_up=report.bytes_up,
            bytes_down=down,
            base_loads=report.base_loads,
            epsilon=dict(report.spent),
        )


def by_site(cohorts: Mapping[str, tuple[str, ...]]) -> Asked:
    """Sites by task turned into tasks by site."""
    names = sorted({site for sites in cohorts.values() for site in sites})
    return {site: tuple(task for task, sites in sorted(cohorts.items()) if site in sites) for site in names}
