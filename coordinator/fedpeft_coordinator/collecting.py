"""Answers of an exchange: each is checked and added to running sums, or becomes a named drop-out. Constant memory per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import numpy as np

from fedpeft.errors import DataError, FedpeftError, PrivacyError, UpdateError
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Counters, Grid, Update, add_counters, snap_counters
from fedpeft.wire import Envelope
from fedpeft.wire.codecs import DeltaCodec, Lanes
from fedpeft.wire.v1.federation_pb2 import RoundReply, TaskResult
from fedpeft_coordinator.state import Round
from fedpeft_coordinator.transport import Answer, Failure

MAX_COUNTERS, MAX_VALUES = 1024, 1 << 18
"""Names of counters, and values of one, that a site may send."""
MAX_REASON = 300
GAVE_UP = ("failed: ", "refused: ", "bad update: ")
"""How reasons begin that are a site's own."""
RESTS = "resting"
"""How reasons begin that pass by themselves."""
NAMED = {TaskResult.STATUS_REFUSED: "refused", TaskResult.STATUS_FAILED: "failed", TaskResult.STATUS_RESTING: RESTS}

Accept = Callable[[str, TaskResult, Envelope], None]
"""Takes one site's result of one task into account, or raises `UpdateError` or `PrivacyError`."""


@dataclass(frozen=True)
class Report:
    """What one answer meant: per task ``ok`` or why it does not count, which tasks the site wants sent whole, and facts.

    ``spent`` is what the site says that its rows have spent, by task; a site that ``rests`` says for how many seconds.
    """

    site: str
    outcomes: Mapping[str, str]
    missing: tuple[str, ...] = ()
    have: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    base_loads: int | None = None
    vanished: bool = False
    bytes_up: int = 0
    spent: Mapping[str, float] = field(default_factory=dict)
    rests: int | None = None

    @property
    def drops(self) -> dict[str, str]:
        """Tasks that this site does not contribute to, and why."""
        return {task: why for task, why in self.outcomes.items() if why != "ok" and task not in self.missing}

    @property
    def unfit(self) -> list[str]:
        """Tasks whose rows this site says that it cannot use."""
        return [task for task, why in self.outcomes.items() if why.startswith(f"failed: {DataError.__name__}")]


def read(answer: Answer, plan: Round, tasks: Sequence[str], accept: Accept) -> Report:
    """Judge one answer to a request for ``tasks``; never raises for what a site sent."""
    if isinstance(answer.result, Failure):
        return Report(answer.site, dict.fromkeys(tasks, answer.result.reason), vanished=answer.result.vanished)
    envelope = answer.result
    try:
        reply = _open(answer.site, envelope, plan.number)
    except FedpeftError as fault:
        return Report(answer.site, dict.fromkeys(tasks, f"bad answer: {line(fault)}"), bytes_up=envelope.size)
    results = {result.task: result for result in reply.results}
    outcomes = {task: _judge(answer.site, results.get(task), envelope, accept) for task in tasks}
    good = [task for task, outcome in outcomes.items() if outcome == "ok"]
    return Report(
        site=answer.site,
        outcomes=outcomes,
        missing=tuple(task for task in tasks if task in results and results[task].status == TaskResult.STATUS_MISSING_VERSION),
        have={task: results[task].adapter_digest for task in good if results[task].adapter_digest},
        seconds=sum(results[task].train_seconds for task in good),
        base_loads=reply.base_loads,
        bytes_up=envelope.size,
        rests=max((one.rests for one in results.values() if one.status == TaskResult.STATUS_RESTING), default=None),
        spent={task: results[task].epsilon for task in good if 0 < results[task].epsilon < inf},
    )


def _open(site: str, envelope: Envelope, number: int) -> RoundReply:
    if envelope.kind != "reply":
        raise UpdateError(f"a {envelope.kind!r} message came, a 'reply' was expected; do both sides run one version?")
    reply = envelope.open(RoundReply)
    if reply.site != site or reply.round != number:
        raise UpdateError(f"it is of {reply.site!r} for round {reply.round}, {site!r} was asked for round {number}")
    return reply


def _judge(site: str, result: TaskResult | None, envelope: Envelope, accept: Accept) -> str:
    if result is None:
        return "failed: the answer has no result for this task"
    if result.status == TaskResult.STATUS_MISSING_VERSION:
        return f"failed: {line(result.reason)}"
    if result.status != TaskResult.STATUS_OK:
        return f"{NAMED.get(result.status, 'failed')}: {line(result.reason)}"
    try:
        accept(site, result, envelope)
    except (UpdateError, PrivacyError) as fault:
        return f"bad update: {line(fault)}"
    return "ok"


@dataclass(frozen=True)
class Tally:
    """Running sums of an evaluation exchange, by task: counters only, those that are in ``lengths`` of these lengths."""

    lengths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    counters: dict[str, Counters] = field(default_factory=dict)

    def accept(self, _site: str, result: TaskResult, _envelope: Envelope) -> None:
        """Add one site's counters. Raises `UpdateError` when they are not finite, or do not fit what was asked for or the others'."""
        mine = counters_of(result)
        require_lengths(self.lengths.get(result.task, {}), {name: len(values) for name, values in mine.items()})
        self.counters[result.task] = add_counters(self.counters.get(result.task, {}), mine)


def require_lengths(known: Mapping[str, int], given: Mapping[str, int]) -> None:
    """Raise `UpdateError` naming a counter of another length than is ``known``: whoever answers first would decide for all others."""
    for name, length in given.items():
        if known.get(name, length) != length:
            raise UpdateError(
                f"counter {name}: {length} values, {known[name]} were asked for; does the site run the same version, with the same encoder?"
            )


class Expected(Protocol):
    """What the updates of a task must look like; without ``codec`` and ``lanes`` they are the grid's 32-bit codes."""

    @property
    def layout(self) -> Layout:
        """Of the values."""
        ...

    @property
    def grid(self) -> Grid:
        """Of the codes."""
        ...

    @property
    def codec(self) -> DeltaCodec | None:
        """Of the message."""
        ...

    @property
    def lanes(self) -> Lanes | None:
        """Of narrow codes."""
        ...


def decode(result: TaskResult, envelope: Envelope, expected: Expected) -> Update:
    """The update that travelled. Raises `UpdateError`; ranges of codes and weight are checked by the sum."""
    layout, codec = expected.layout, expected.codec
    if result.layout_fingerprint != layout.fingerprint:
        raise UpdateError(f"layout is {result.layout_fingerprint[:12]!r}, the plan has {layout.fingerprint[:12]}; it trained other tensors")
    values = envelope.array(result.task, layout.fingerprint)
    if expected.lanes is not None:
        codes = expected.lanes.grow(expected.lanes.read(values), 1)
        return Update(layout, expected.grid, codes, result.weight, counters_of(result), 1)
    wanted = np.int32 if codec is None else np.uint8
    if values.dtype != wanted:
        raise UpdateError(f"values are {values.dtype}, {np.dtype(wanted)} codes were expected; do both sides run one version?")
    if codec is None:
        return Update(layout, expected.grid, values, result.weight, counters_of(result), 1)
    delta = Tensors(layout, codec.decode(values.data, layout.size))
    return Update.encode(delta, result.weight, counters_of(result), expected.grid)


def counters_of(result: TaskResult) -> Counters:
    """The counters of a result. Raises `UpdateError` when there are too many or they are not finite."""
    if len(result.counters) > MAX_COUNTERS:
        raise UpdateError(f"{len(result.counters)} counters, at most {MAX_COUNTERS} are taken")
    counters = {name: tuple(values.values) for name, values in result.counters.items()}
    longest = max(map(len, counters.values()), default=0)
    if longest > MAX_VALUES:
        raise UpdateError(f"a counter of {longest} values, at most {MAX_VALUES} are taken")
    return snap_counters(counters)


def line(text: object) -> str:
    """One line of at most ``MAX_REASON`` characters, printable: what a site writes must not garble a screen or a log."""
    flat = " ".join(str(text).split())
    return "".join(sign if sign.isprintable() else "?" for sign in flat)[:MAX_REASON]
