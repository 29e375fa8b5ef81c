"""G1, G2: CPU time of a whole federated round besides training, 1.0 M values per client.

G1: our coordinator (plan, journal on disk, requests, in-memory transport, checks, sum, commit) with sites that verify, encode and
pack as real ones do but train nothing. Peer: what flwr's FedAvg does with 224 float32 arrays per message, in one process and
without Ray, which is not installed (its 141-155 ms per client in PERFORMANCE.md contain this and its processes): records,
protobuf, numpy, ``aggregate_arrayrecords``. The peer checks nothing; ours sums over every array (AES-GMAC) when it is packed and
when it is unpacked, and hashes the adapter (SHA-256) where a site compares it with the plan, which is most of its time. G2: the same
values through flwr's real messages (object tree, SHA-256 per object, 5 MiB pieces), our one array beside flwr's 224, and the aggregation
alone. One thread, interleaved, least CPU time of the repeats.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from fedpeft.schemes import SCHEMES, SERVER_OPTIMIZERS, Phase, SiteContext, Sum
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update
from fedpeft.wire import Envelope, flat, flower
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello, Holding, RoundPlan, RoundReply, TaskPlan, TaskResult
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.setup import Limits, Setup, TaskSetup
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

ARRAYS, SIZE = 224, 4_465
CLIENTS = (10, 20)
MESSAGES = 20
LAYOUT = Layout.of([Entry("AB"[place % 2], f"layer.{place}.lora_{'AB'[place % 2]}", (SIZE,)) for place in range(ARRAYS)])


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows G1 (CPU seconds per client) and G2 (CPU seconds per round and per aggregation)."""
    _run_identity()
    return [row for clients in CLIENTS for row in _rounds(clients, repeats)] + _messages(repeats)


# G1 ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """Keeps the adapter as values, checks it by digest, adds a constant, answers an update."""

    name: str
    held: Tensors | None = None

    def __call__(self, envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            return Envelope.of("reply", Capabilities(site=self.name, holdings=[Holding(task="t", train_examples=100)]))
        plan = envelope.open(RoundPlan)
        task = plan.tasks[0]
        start = self._start(envelope, task)
        scheme = SCHEMES[json.loads(task.scheme_json)["kind"]]()
        phase = scheme.phase(plan.round, LAYOUT)
        after = Tensors(LAYOUT, start.flat + np.float32(1e-3))
        update = Update.encode(scheme.contribution(start, after, phase, SiteContext(0)), 1.0, {}, Grid(task.grid_sites, task.grid_reach))
        result = TaskResult(task="t", status=TaskResult.STATUS_OK, weight=1.0, layout_fingerprint=update.layout.fingerprint)
        result.adapter_digest = task.adapter_digest
        reply = RoundReply(site=self.name, run=plan.run, round=plan.round, results=[result])
        return Envelope.of("reply", reply, {"t": flat.pack(update.layout.fingerprint, update.codes)})

    def _start(self, envelope: Envelope, task: TaskPlan) -> Tensors:
        layout = LAYOUT.subset(task.down_roles) if task.down_roles else LAYOUT
        part = Tensors(layout, envelope.array("t", layout.fingerprint).astype(np.float32, copy=False))
        whole = self.held.patch(part) if task.previous_digest and self.held is not None else part
        assert whole.digest == task.adapter_digest
        self.held = whole
        return whole


@dataclass
class Clock:
    """CPU seconds that sites used, to be taken off the whole."""

    seconds: float = 0.0

    def around(self, site: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``site``, with its time taken."""

        def timed(given: Any) -> Any:
            begin = process_time()
            answer = site(given)
            self.seconds += process_time() - begin
            return answer

        return timed


def _rounds(clients: int, repeats: int) -> list[dict[str, object]]:
    rows = []
    for kind, name in (("fedavg", "all values travel"), ("alternating", "B and A in turn")):
        clocks = {"ours": Clock(), "peer": Clock()}
        with tempfile.TemporaryDirectory() as folder:
            ours = partial(_one_round, _coordinator(Path(folder), (clients, kind, repeats + 2), clocks["ours"]))
            whole, server = _split({"ours": ours, "peer": _flower_peer(clients, clocks["peer"])}, clocks, repeats)
        for what, least in (("", whole), (", server only", server)):
            case = f"round_overhead {clients} x 1.0M, {name}{what}"
            rows.append(_row("G1", case, least["ours"] / clients, least["peer"] / clients, "ratio >= 50", "CPU s/client"))
    return rows


def _split(contenders: dict[str, Callable[[], Any]], clocks: dict[str, Clock], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Least CPU seconds of each, interleaved: of the whole, and without the sites."""
    whole, server = (dict.fromkeys(contenders, float("inf")) for _ in range(2))
    for turn in range(repeats + 1):
        for name, act in contenders.items():
            clocks[name].seconds, begin = 0.0, process_time()
            act()
            seconds = process_time() - begin
            if turn:
                whole[name] = min(whole[name], seconds)
                server[name] = min(server[name], seconds - clocks[name].seconds)
    return whole, server


def _coordinator(folder: Path, size: tuple[int, str, int], clock: Clock) -> Coordinator:
    clients, kind, rounds = size
    start = Tensors(LAYOUT, np.random.default_rng(0).standard_normal(LAYOUT.size, np.float32))
    task = TaskSetup("t", LAYOUT, "{}", "{}", "{}", lambda: start, 0)
    scheme = json.dumps({"kind": kind})
    server = SERVER_OPTIMIZERS["sgd"]()
    setup = Setup("bench", 0, rounds, {"t": task}, SCHEMES[kind](), scheme, server, Limits(wait_for_sites=clients))
    sites: dict[str, Callable[[Envelope], Envelope]] = {f"site-{place}": clock.around(Site(f"site-{place}")) for place in range(clients)}
    journal = Journal(f"sqlite:///{folder / 'journal.sqlite'}")
    return Coordinator(setup, journal, Store(folder / "blobs"), MemoryTransport(sites, Hello(tasks=["t"])), Events())


def _one_round(coordinator: Coordinator) -> None:
    coordinator.step()
    while coordinator.history[-1].step != "published":
        coordinator.step()
    assert coordinator.history[-1].updated == ["t"]


def _flower_peer(clients: int, clock: Clock) -> Callable[[], object]:
    """FedAvg's work with flwr's records: broadcast, parse, change, answer, parse, aggregate."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    rng = np.random.default_rng(0)
    values = [rng.standard_normal(SIZE, np.float32) for _ in range(ARRAYS)]

    def dump(records: RecordDict) -> bytes:
        return bytes(recorddict_to_proto(records).SerializeToString())

    def parse(data: bytes) -> RecordDict:
        return recorddict_from_proto(Proto.FromString(data))

    @clock.around
    def site(data: bytes) -> bytes:
        trained = [value + np.float32(1e-3) for value in parse(data).array_records["arrays"].to_numpy_ndarrays()]
        return dump(RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": 100})}))

    def whole() -> object:
        sent = [RecordDict({"arrays": ArrayRecord(values)}) for _ in range(clients)]
        return aggregate_arrayrecords([parse(site(dump(records))) for records in sent], "num-examples")

    return whole


# G2 ------------------------------------------------------------------------------------------------------------------------


def _messages(repeats: int) -> list[dict[str, object]]:
    values = Tensors(LAYOUT, np.random.default_rng(0).standard_normal(LAYOUT.size, np.float32) * np.float32(1e-3))
    grid = Grid(MESSAGES)
    codes = Update.encode(values, 1.0, {}, grid).codes
    replies = {"ours": _flat_replies(values, codes), "peer": _array_replies(values)}
    aggregate = {
        "ours": lambda: _sum_ours(replies["ours"], grid),
        "unchecked": lambda: _sum_ours(replies["ours"], grid, verify=False),
        "peer": lambda: _sum_flower(replies["peer"]),
    }
    np.testing.assert_allclose(aggregate["ours"]().flat, aggregate["peer"](), atol=2 * grid.step)
    rounds = {"ours": lambda: _round_ours(values, codes, grid), "peer": lambda: _round_flower(values)}
    whole, sums = _least(rounds, repeats), _least(aggregate, repeats)
    return [
        _row("G2", f"flwr_shim {MESSAGES} x 1.0M, round", whole["ours"], whole["peer"], "ratio >= 2", "CPU s"),
        _row("G2", f"flwr_shim {MESSAGES} x 1.0M, aggregate, rechecked", sums["ours"], sums["peer"], "", "CPU s"),
        _row("G2", f"flwr_shim {MESSAGES} x 1.0M, aggregate, unchecked as peer", sums["unchecked"], sums["peer"], "ratio >= 8", "CPU s"),
    ]


def _round_ours(values: Tensors, codes: Any, grid: Grid) -> Tensors:
    """Broadcast (packed once), 20 answers, and the sum, all through flwr's messages."""
    down = flat.pack(LAYOUT.fingerprint, values.flat)
    for _ in range(MESSAGES):
        arrived = _through(flower.to_records(Envelope("train", b"plan", {"t": down})))
        flower.from_records(arrived).array("t", LAYOUT.fingerprint)
    return _sum_ours(_flat_replies(values, codes), grid)


def _flat_replies(values: Tensors, codes: Any) -> list[Any]:
    fingerprint = values.layout.fingerprint
    return [_through(flower.to_records(Envelope("reply", b"", {"t": flat.pack(fingerprint, codes)}))) for _ in range(MESSAGES)]


def _sum_ours(replies: list[Any], grid: Grid, verify: bool = True) -> Tensors:
    total = Sum(LAYOUT, grid)
    for records in replies:
        codes = flat.unpack(flower.from_records(records).arrays["t"], verify)[1]
        total.add(Update(LAYOUT, grid, codes, 1.0))
    return SCHEMES["fedavg"]().advance(
        Tensors.zeros(LAYOUT), total.result().mean(), Phase("all", LAYOUT.roles), SERVER_OPTIMIZERS["sgd"](), {}
    )[0]


def _round_flower(values: Tensors) -> Any:
    from flwr.app import ArrayRecord, RecordDict

    for _ in range(MESSAGES):
        arrived = _through(RecordDict({"arrays": ArrayRecord(list(values.named().values()))}))
        arrived.array_records["arrays"].to_numpy_ndarrays()
    return _sum_flower(_array_replies(values))


def _array_replies(values: Tensors) -> list[Any]:
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    arrays = list(values.named().values())
    return [_through(RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 100})})) for _ in range(MESSAGES)]


def _sum_flower(replies: list[Any]) -> Any:
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    return np.concatenate(aggregate_arrayrecords(replies, "num-examples").to_numpy_ndarrays())


def _through(records: Any) -> Any:
    """The records after a trip as a flwr message: cut into objects, hashed, serialised, and put together again."""
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    message = Message(records, 1, "train.fedpeft")
    pieces = {name: piece.deflate() for name, piece in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, pieces).content  # type: ignore[attr-defined]


def _run_identity() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


# measuring -----------------------------------------------------------------------------------------------------------------


def _least(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each, interleaved, after one warm-up."""
    least = dict.fromkeys(contenders, float("inf"))
    for turn in range(repeats + 1):
        for name, act in contenders.items():
            begin = process_time()
            act()
            if turn:
                least[name] = min(least[name], process_time() - begin)
    return least


def _row(row: str, case: str, ours: float, peer: float, goal: str, unit: str) -> dict[str, object]:
    return {"row": row, "case": case, "ours": ours, "peer": peer, "ratio": peer / ours, "goal": goal, "unit": unit}
