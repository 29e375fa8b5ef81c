"""The transport over Flower's grid: sites are found by a hello, asked by name, and asked again under whatever node they return.

Flower's node ids change when a SuperNode restarts, its error replies carry the SuperLink's own id, and a broken transfer
can lose a reply for good. So every message is mapped by its id to a site, a site may have several messages under way, and
the first good answer wins; the rest is pulled and dropped, because replies nobody pulls stay in the SuperLink's memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.errors import FedpeftError, LinkError
from fedpeft.wire import Envelope, flower
from fedpeft.wire._compat import ERRORS, RunLost, link_faults
from fedpeft.wire.pacing import pause
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello
from fedpeft_coordinator.transport import Answer, Failure

PULL_AT_ONCE = 8
"""Answers taken into memory together."""
TICK_SECONDS = 0.1
HELLO_SECONDS = 180.0
"""A node that does not answer a hello for so long is asked once more."""
PATIENCE_SECONDS = 90.0
"""The link may be unreachable for so long before the run is opened anew."""
AGAIN = frozenset({"NODE_UNAVAILABLE", "CLIENT_APP_CRASHED", "MESSAGE_UNAVAILABLE", "REPLY_MESSAGE_UNAVAILABLE"})
"""Faults after which asking again can help."""

Tell = Callable[..., None]


@dataclass(frozen=True)
class Session:
    """An open run: its grid, and how it is ended."""

    grid: Grid
    close: Callable[[], None] = lambda: None


Connect = Callable[[], Session]
"""Opens a run; called again when the run was lost. Raises `LinkError` when there will be none."""


@dataclass(frozen=True)
class Place:
    """Where a message went."""

    site: str
    node: int


@dataclass
class Job:
    """One exchange under way: what is still to be sent, and which message ids stand for which site."""

    requests: Mapping[str, Envelope]
    began: float
    end: float
    retries: int
    waiting: set[str]
    open: dict[str, Place] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    sent: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> set[str]:
        """Sites without an answer."""
        return self.waiting | self.under_way

    @property
    def under_way(self) -> set[str]:
        """Sites with a message under way."""
        return {place.site for place in self.open.values()}

    def settle(self, site: str) -> dict[str, Place]:
        """The site is answered: returns its messages, which nobody waits for any more."""
        self.waiting.discard(site)
        late = {key: place for key, place in self.open.items() if place.site == site}
        self.open = {key: place for key, place in self.open.items() if place.site != site}
        return late


class FlowerTransport:
    """A `Transport` over runs that ``connect`` opens; ``tell`` hears of lost nodes, repeated requests and reopened runs.

    ``barred`` names the sites that may connect no more: no answer of theirs is waited for.
    """

    def __init__(
        self, connect: Connect, hello: Hello, tell: Tell = lambda *_a, **_k: None, barred: Callable[[], frozenset[str]] = frozenset
    ) -> None:
        self._connect, self._hello, self._tell, self._barred = connect, Envelope.of("hello", hello), tell, barred
        self._session: Session | None = None
        self._asked: dict[int, float] = {}
        self._hellos: dict[str, int] = {}
        self._homes: dict[str, int] = {}
        self._known: dict[str, Capabilities] = {}
        self._late: dict[str, Place] = {}
        self._silent_since: float | None = None

    def sites(self) -> dict[str, Capabilities]:
        """The sites that are connected and do not still work on something nobody waits for."""
        self._guarded(lambda: self._discover(None))
        busy = set(self._late.values())
        return {site: self._known[site] for site, node in self._homes.items() if Place(site, node) not in busy}

    def exchange(self, requests: Mapping[str, Envelope], deadline: float, retries: int) -> Iterator[Answer]:
        """See `Transport.exchange`."""
        began = heard = time.monotonic()
        job = Job(requests, began, began + deadline, retries, set(requests))
        doubt = False
        while job.left and time.monotonic() < job.end:
            answers: list[Answer] = []
            lost = self._guarded(partial(self._advance, job, answers))
            answers += self._given_up(job)
            yield from answers
            heard = time.monotonic() if answers else heard
            doubt = doubt or self._silent_since is not None
            if lost or (doubt and self._silent_since is None):
                # A transfer that broke off can have lost an answer for good, and a lost run has lost all of them.
                job.waiting, doubt = job.waiting | job.under_way, False
            if lost:
                job.open.clear()
            time.sleep(pause(time.monotonic() - heard, TICK_SECONDS) if job.left else 0.0)
        self._late |= job.open
        for site in sorted(job.left):
            yield Answer(site, Failure(self._absence(site, deadline), vanished=True), time.monotonic() - began)

    def close(self) -> None:
        """End the run."""
        if self._session is not None:
            self._session.close()
            self._session = None

    # the link --------------------------------------------------------------------------------------------------------------

    def _guarded(self, act: Callable[[], None]) -> bool:
        """Do ``act``; True when the run was lost meanwhile and a new one was opened. A short silence is waited out."""
        try:
            act()
            self._silent_since = None
            return False
        except RunLost as fault:
            self._tell("link", reason=str(fault))
        except LinkError as fault:
            self._silent_since = self._silent_since or time.monotonic()
            if time.monotonic() - self._silent_since < PATIENCE_SECONDS:
                return False
            self._tell("link", reason=str(fault))
        self._reopen()
        return True

    def _reopen(self) -> None:
        self.close()
        for memory in (self._asked, self._hellos, self._homes, self._known, self._late):
            memory.clear()
        self._silent_since = None

    @property
    def _grid(self) -> Grid:
        if self._session is None:
            self._session = self._connect()
        return self._session.grid

    # sites -----------------------------------------------------------------------------------------------------------------

    def _discover(self, job: Job | None) -> None:
        """Say hello to new nodes, take in who answered, forget who left, drop late answers."""
        grid = self._grid
        with link_faults("list nodes"):
            names = {int(node.node_id): str(node.name) for node in grid.get_nodes()}
        for site in [site for site, node in self._homes.items() if node not in names]:
            self._forget(site)
        self._asked = {node: since for node, since in self._asked.items() if node in names}
        now = time.monotonic()
        new = [node for node in names if now - self._asked.get(node, -HELLO_SECONDS) >= HELLO_SECONDS and node not in self._homes.values()]
        self._greet(new)
        for key, message in self._pull(self._hellos):
            node = self._hellos.pop(key)
            self._meet(node, names.get(node, ""), message, job)
        for key, _ in self._pull(self._late):
            del self._late[key]

    def _greet(self, nodes: list[int]) -> None:
        messages = [flower.request(self._hello, node, "hello", HELLO_SECONDS) for node in nodes]
        for node, key in zip(nodes, self._push(messages), strict=True):
            self._asked[node] = time.monotonic()
            if key:
                self._hellos[key] = node

    def _meet(self, node: int, registered: str, message: Message, job: Job | None) -> None:
        """Take in a node's answer to the hello; a site that comes under a new node is asked there what it was asked before."""
        if message.has_error():
            self._asked[node] = time.monotonic() - HELLO_SECONDS + 5.0
            return
        try:
            given = flower.from_records(message.content).open(Capabilities)
        except FedpeftError as fault:
            self._tell("stranger", node=node, reason=str(fault))
            return
        if registered and registered != given.site:
            self._tell("stranger", node=node, reason=f"is registered as {registered!r} and says it is {given.site!r}")
            return
        self._homes[given.site], self._known[given.site] = node, given
        if job is not None and given.site in job.under_way:
            job.waiting.add(given.site)

    def _forget(self, site: str) -> None:
        self._tell("left", site=site)
        self._homes.pop(site, None)
        self._known.pop(site, None)

    # messages --------------------------------------------------------------------------------------------------------------

    def _advance(self, job: Job, answers: list[Answer]) -> None:
        self._discover(job)
        self._remind(job)
        self._send(job)
        for key, message in self._pull(job.open):
            if key in job.open:
                answers.extend(self._take(job, key, message))

    def _remind(self, job: Job) -> None:
        """Ask again after a long silence: a message can be lost between SuperLink and SuperNode. Sites keep their answers."""
        silence = max((job.end - job.began) / (job.retries + 1), 60.0)
        now = time.monotonic()
        job.waiting |= {site for site in job.under_way if now - job.sent[site] > silence}

    def _send(self, job: Job) -> None:
        ready = sorted(site for site in job.waiting if site in self._homes)
        ttl = max(job.end - time.monotonic(), 1.0) + 60.0
        messages = [flower.request(job.requests[site], self._homes[site], job.requests[site].kind, ttl) for site in ready]
        for site, key in zip(ready, self._push(messages), strict=True):
            if not key:
                self._forget(site)
                continue
            job.waiting.discard(site)
            job.open[key], job.sent[site] = Place(site, self._homes[site]), time.monotonic()

    def _take(self, job: Job, key: str, message: Message) -> Iterable[Answer]:
        """The answer that ``message`` is, or none when the site is asked again."""
        place = job.open.pop(key)
        site, seconds = place.site, time.monotonic() - job.began
        if not message.has_error():
            self._late |= job.settle(site)
            try:
                return [Answer(site, flower.from_records(message.content), seconds)]
            except LinkError as fault:
                return [Answer(site, Failure(f"bad answer: {fault}"), seconds)]
        return self._failed(job, place, message, seconds)

    def _failed(self, job: Job, place: Place, message: Message, seconds: float) -> Iterable[Answer]:
        site, name = place.site, ERRORS.get(message.error.code, f"error {message.error.code}")
        if name == "NODE_UNAVAILABLE" and self._homes.get(site) == place.node:
            self._forget(site)
        if site in job.left:  # it was asked, or will be, under another id as well
            return []
        job.tries[site] += 1
        if name in AGAIN and job.tries[site] <= job.retries:
            self._tell("again", site=site, reason=name)
            job.waiting.add(site)
            return []
        return [Answer(site, Failure(f"failed: {name}: {message.error.reason or ''}", vanished=name in AGAIN), seconds)]

    def _given_up(self, job: Job) -> list[Answer]:
        gone = sorted(job.left & self._barred())
        for site in gone:
            job.settle(site)
        reason = Failure("shut out: its key was taken away", vanished=True)
        return [Answer(site, reason, time.monotonic() - job.began) for site in gone]

    def _push(self, messages: list[Message]) -> list[str]:
        if not messages:
            return []
        with link_faults("send"):
            keys = [str(key or "") for key in self._grid.push_messages(messages)]
        return keys or [""] * len(messages)

    def _pull(self, keys: Mapping[str, Any]) -> Iterator[tuple[str, Message]]:
        """Answers that have arrived, a few in memory at a time."""
        ids = list(keys)
        for start in range(0, len(ids), PULL_AT_ONCE):
            with link_faults("receive"):
                messages = list(self._grid.pull_messages(ids[start : start + PULL_AT_ONCE]))
            while messages:
                message = messages.pop()
                yield message.metadata.reply_to_message_id, message

    def _absence(self, site: str, deadline: float) -> str:
        where = "its node is connected" if site in self._homes else "it is not connected"
        return f"no answer within {deadline:g} s, {where}"
