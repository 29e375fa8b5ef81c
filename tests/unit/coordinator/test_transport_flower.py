"""The Flower transport over a grid in memory: sites by name, whatever happens to nodes, messages and runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message, RecordDict

from fedpeft.wire import Envelope, _compat, flower
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello
from fedpeft_coordinator import transport_flower
from fedpeft_coordinator.transport import Answer, Failure
from fedpeft_coordinator.transport_flower import FlowerTransport, Session

CODES = {name: code for code, name in _compat.ERRORS.items()}
TRAIN = Envelope("train", b"plan")


@pytest.fixture(autouse=True)
def _run_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    monkeypatch.setattr(transport_flower, "TICK_SECONDS", 0.001)


@dataclass
class FakeGrid:
    """Nodes answer at once unless ``answer`` says otherwise; None keeps silent."""

    nodes: dict[int, str]
    names: dict[int, str] = field(default_factory=dict)
    answer: Callable[[int, Message], Any] = lambda _node, _message: Envelope("reply", b"done")
    sent: list[tuple[int, str]] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)
    broken: list[Exception] = field(default_factory=list)
    ids: Iterable[int] = field(default_factory=itertools.count)

    def get_nodes(self) -> list[SimpleNamespace]:
        if self.broken:
            raise self.broken.pop(0)
        return [SimpleNamespace(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return ""
        key = f"m{next(self.ids)}"  # type: ignore[call-overload]
        message.metadata.__dict__["_message_id"] = key
        kind = flower.from_records(message.content).kind
        self.sent.append((node, kind))
        if kind == "hello":
            given: Any = Envelope.of("reply", Capabilities(site=self.nodes[node]))
        else:
            given = self.answer(node, message)
        if isinstance(given, Envelope):
            self.replies[key] = Message(flower.to_records(given), reply_to=message)
        elif isinstance(given, str):
            self.replies[key] = Message(Error(CODES[given], "why"), reply_to=message)
        elif given is not None:
            self.replies[key] = Message(given, reply_to=message)
        return key

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.replies.pop(key) for key in ids if key in self.replies]

    def count(self, node: int, kind: str = "train") -> int:
        return self.sent.count((node, kind))


def ask(transport: FlowerTransport, *sites: str, deadline: float = 60.0, retries: int = 2) -> dict[str, Answer]:
    return {answer.site: answer for answer in transport.exchange(dict.fromkeys(sites, TRAIN), deadline, retries)}


def over(*grids: FakeGrid, said: list[tuple[str, dict[str, Any]]] | None = None) -> FlowerTransport:
    left = list(grids)
    return FlowerTransport(lambda: Session(left.pop(0)), Hello(), lambda kind, **facts: (said or []).append((kind, facts)))  # type: ignore[arg-type]


def test_sites_are_found_and_asked_by_name() -> None:
    grid = FakeGrid({11: "north", 12: "south"})
    transport = over(grid)
    found = ask(transport, "north", "south")
    assert {site: answer.result for site, answer in found.items()} == dict.fromkeys(("north", "south"), Envelope("reply", b"done"))
    assert sorted(transport.sites()) == ["north", "south"]
    assert grid.count(11, "hello") == 1


def test_a_site_that_comes_later_is_asked_then() -> None:
    grid = FakeGrid({11: "north"})

    def answer(_node: int, _message: Message) -> Envelope:
        grid.nodes[12] = "south"
        return Envelope("reply", b"done")

    grid.answer = answer
    assert isinstance(ask(over(grid), "north", "south")["south"].result, Envelope)


@pytest.mark.parametrize("code", ["NODE_UNAVAILABLE", "CLIENT_APP_CRASHED", "REPLY_MESSAGE_UNAVAILABLE"])
def test_after_a_death_the_site_is_asked_again_under_its_new_node(code: str) -> None:
    grid = FakeGrid({11: "north"})

    def answer(node: int, _message: Message) -> Any:
        if node == 11:
            del grid.nodes[11]
            grid.nodes[21] = "north"
            return code
        return Envelope("reply", b"done")

    grid.answer = answer
    assert isinstance(ask(over(grid), "north")["north"].result, Envelope)
    assert (grid.count(11), grid.count(21)) == (1, 1)


def test_a_new_node_is_asked_before_the_old_one_is_declared_dead() -> None:
    grid = FakeGrid({11: "north"})

    def answer(node: int, _message: Message) -> Any:
        grid.nodes[21] = "north"
        return None if node == 11 else Envelope("reply", b"done")

    grid.answer = answer
    transport = over(grid)
    assert isinstance(ask(transport, "north")["north"].result, Envelope)
    assert list(transport.sites()) == ["north"]


def test_retries_end_in_a_named_failure() -> None:
    grid = FakeGrid({11: "north"}, answer=lambda _node, _message: "CLIENT_APP_CRASHED")
    result = ask(over(grid), "north", retries=2)["north"].result
    assert isinstance(result, Failure)
    assert "CLIENT_APP_CRASHED" in result.reason
    assert grid.count(11) == 3


def test_a_fault_of_the_worker_is_not_asked_again() -> None:
    grid = FakeGrid({11: "north"}, answer=lambda _node, _message: "CLIENT_APP_RAISED_EXCEPTION")
    result = ask(over(grid), "north")["north"].result
    assert result == Failure("failed: CLIENT_APP_RAISED_EXCEPTION: why")
    assert grid.count(11) == 1


def test_silence_is_a_named_failure_and_the_site_is_busy_until_it_answers() -> None:
    grid = FakeGrid({11: "north"}, answer=lambda _node, _message: None)
    transport = over(grid)
    transport.sites()  # known before time runs, however slowly the machine works
    found = ask(transport, "north", "south", deadline=0.1)
    assert found["north"].result == Failure("no answer within 0.1 s, its node is connected", vanished=True)
    assert found["south"].result == Failure("no answer within 0.1 s, it is not connected", vanished=True)
    assert transport.sites() == {}
    key = next(key for key, place in transport._late.items() if place.site == "north")
    message = flower.request(TRAIN, 11, "", 10.0)
    message.metadata.__dict__["_message_id"] = key
    grid.replies[key] = Message(RecordDict({}), reply_to=message)
    assert list(transport.sites()) == ["north"]
    assert grid.replies == {}


def test_a_foreign_answer_is_a_named_failure() -> None:
    grid = FakeGrid({11: "north"}, answer=lambda _node, _message: RecordDict({}))
    result = ask(over(grid), "north")["north"].result
    assert isinstance(result, Failure)
    assert result.reason.startswith("bad answer")


def test_a_lost_run_is_opened_anew_and_everything_asked_again() -> None:
    first, second = FakeGrid({11: "north"}), FakeGrid({31: "north"})

    def answer(_node: int, _message: Message) -> None:
        first.broken.append(_compat.RunLost("gone"))

    first.answer = answer
    said: list[tuple[str, dict[str, Any]]] = []
    assert isinstance(ask(over(first, second, said=said), "north")["north"].result, Envelope)
    assert (first.count(11), second.count(31)) == (1, 1)


def test_a_broken_transfer_is_doubted_and_asked_again() -> None:
    grid = FakeGrid({11: "north"})

    def answer(_node: int, _message: Message) -> Any:
        if grid.count(11) == 1:
            grid.broken.append(httpx.ReadError("cut"))
            return None
        return Envelope("reply", b"done")

    grid.answer = answer
    assert isinstance(ask(over(grid), "north")["north"].result, Envelope)
    assert grid.count(11) == 2


def test_a_registered_node_may_only_speak_for_itself() -> None:
    grid = FakeGrid({11: "north", 12: "north"}, names={11: "north", 12: "south"})
    said: list[tuple[str, dict[str, Any]]] = [("", {})]
    transport = over(grid, said=said)
    for _ in range(3):
        transport.sites()
    assert transport._homes == {"north": 11}
    assert [facts["reason"] for kind, facts in said if kind == "stranger"] == ["is registered as 'south' and says it is 'north'"]


def test_a_site_that_is_shut_out_is_not_waited_for() -> None:
    grid = FakeGrid({11: "north", 12: "south"}, answer=lambda node, _message: None if node == 12 else Envelope("reply", b"done"))

    def barred() -> frozenset[str]:
        return frozenset({"south", "west"} if grid.count(12) else ())

    found = ask(FlowerTransport(lambda: Session(grid), Hello(), barred=barred), "north", "south", deadline=60.0)  # type: ignore[arg-type]
    assert isinstance(found["north"].result, Envelope)
    assert found["south"].result == Failure("shut out: its key was taken away", vanished=True)
    assert found["south"].seconds < 30.0
