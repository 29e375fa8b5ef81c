"""Clusters of undeclared tasks: before a round every site says which of them it takes (`fedpeft.schemes.ifca`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_coordinator.exchange import Around, Exchange
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import Round


def alternatives(setup: Setup) -> dict[str, tuple[str, ...]]:
    """The clusters of each set of rows that has more than one."""
    found: dict[str, list[str]] = {}
    for name, task in setup.tasks.items():
        found.setdefault(task.rows or name, []).append(name)
    return {rows: tuple(names) for rows, names in found.items() if len(names) > 1}


@dataclass
class Choices:
    """What sites chose: the clusters that each takes."""

    taken: dict[str, list[str]] = field(default_factory=dict)

    def accept(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        """Take one choice in."""
        self.taken.setdefault(site, []).append(result.task)


def settle(plan: Round, writer: Writer, around: Around) -> bool:
    """Let every present site say which clusters it takes, by the adapters before ``plan``; whether there was anything to choose.

    A site that does not say takes none.

    Raises:
        LinkError: sites cannot be reached at all.
    """
    clusters = [name for names in alternatives(writer.setup).values() for name in names]
    if not clusters:
        return False
    holders = {site.name: tuple(name for name in clusters if site.train.get(name, 0) > 0) for site in around.roster.present}
    asked, choices = {name: tasks for name, tasks in holders.items() if tasks}, Choices()
    exchange = Exchange(
        "choose",
        plan,
        lambda site, tasks, whole: writer.choose(plan, around.roster.sites[site], tasks, whole),
        choices.accept,
        writer.setup.limits,
    )
    exchange.run(asked, around)
    passed = {site: tuple(name for name in tasks if name not in choices.taken.get(site, ())) for site, tasks in asked.items()}
    around.roster.passes(passed)
    around.events("choices", round=plan.number, passed={site: list(names) for site, names in passed.items()})
    return True
