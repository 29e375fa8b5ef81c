"""Clusters of undeclared tasks: before a round every site says which of them it takes (`fedpeft.schemes.ifca`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_coordinator.exchange import Around, Exchange
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.roster import Roster
from fedpeft_coordinator.state import Round, Site
from fedpeft_coordinator.summary import why


@dataclass
class Choices:
    """What sites chose: the clusters that each takes."""

    taken: dict[str, list[str]] = field(default_factory=dict)

    def accept(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        """Take one choice in."""
        self.taken.setdefault(site, []).append(result.task)


def undecided(site: Site) -> Site:
    """The site as if it took every cluster of its rows: it may be asked to choose."""
    return replace(site, passes=())


def wait(plan: Round, planned: Callable[[], Round], roster: Roster) -> None:
    """Wait for those whom ``plan`` lacks (``planned`` plans it anew), or for a site that has yet to choose. Raises `CohortError`."""
    roster.wait(lambda: bool(planned().asked) or roster.undecided, lambda: f"round {plan.number}: {why(plan)}")


def settle(plan: Round, writer: Writer, around: Around) -> None:
    """Let every present site say which clusters it takes, by the adapters before ``plan``.

    A site that does not say takes none.

    Raises:
        LinkError: sites cannot be reached at all.
    """
    names = [name for name in writer.setup.tasks if name in writer.setup.clusters]
    holders = {site.name: tuple(name for name in names if site.train.get(name, 0) > 0) for site in around.roster.present}
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
