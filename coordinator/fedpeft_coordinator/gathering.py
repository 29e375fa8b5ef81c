"""What sites send in the clear: one exchange to train, one to score."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedpeft.update import Counters, Update
from fedpeft.wire.codecs import Lanes
from fedpeft_coordinator.collecting import Accept, Tally
from fedpeft_coordinator.exchange import Around, Drops, Exchange, by_site
from fedpeft_coordinator.requests import Writer
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.updates import Protected, Updates

Able = Mapping[str, tuple[str, ...]]
"""Sites by task."""


def train(plan: Round, writer: Writer, around: Around, lanes: Callable[[TaskRound], Lanes | None]) -> tuple[Updates, Drops]:
    """The updates of every task that ``plan`` asks for, and who dropped out of which. Raises `LinkError`."""
    updates = Updates(plan, writer.setup, lanes)
    exchange = Exchange(
        "train",
        plan,
        lambda site, tasks, whole: writer.train(plan, around.roster.sites[site], tasks, whole),
        updates.accept,
        writer.setup.limits,
    )
    return updates, exchange.run(by_site({name: plan.tasks[name].cohort for name in plan.asked}), around)


def score(done: Round, able: Able, writer: Writer, around: Around) -> dict[str, Counters]:
    """Counters of held-out rows, per task, of the sites that are ``able``. Raises `LinkError`."""
    tally = Tally({name: writer.setup.tasks[name].lengths for name in able})
    _score(done, able, writer, around, tally.accept)
    return tally.counters


def protected(done: Round, able: Able, writer: Writer, around: Around) -> dict[str, Update]:
    """The vectors of counters of held-out rows, summed per task of ``able``, as its mechanism reads them. Raises `LinkError`."""
    sums = Protected(done, able)
    _score(done, able, writer, around, sums.accept)
    return sums.totals


def _score(done: Round, able: Able, writer: Writer, around: Around, accept: Accept) -> None:
    exchange = Exchange(
        "evaluate",
        done,
        lambda site, tasks, whole: writer.evaluate(done, around.roster.sites[site], tasks, whole),
        accept,
        writer.setup.limits,
    )
    exchange.run(by_site(able), around)
