"""C1, C2 and D4: bytes up a value beside the test loss that they cost, at equal rounds; and how fast codecs write and read.

Peer: the same delta as flwr's fp32 record in protobuf (C1, C2), and as the int64 vector of its SecAgg+ (D4). Every run starts from the
same adapter and trains on the same rows (tests/bench/_federated.py); residuals are kept. What is lost is the share of the uncompressed
run's improvement; below 0 the run with the codec ended better. One run each: readings of +-0.1 % are its noise.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time

import numpy as np
from numpy.typing import NDArray
from tests.bench._common import layout_of, least, reply
from tests.bench._federated import CLIENTS, Task, federate, markov, speakers

from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update
from fedpeft.wire.codecs import DeltaCodec, Int2, Int3, Int4, Int8, Lanes, Ring, seed_of
from fedpeft.wire.codecs.feedback import receive, send
from fedpeft.wire.codecs.ring import pack

ROUNDS = {"markov": 25, "speakers": 15}
SIZES = (224, 4464)
GOALS: tuple[tuple[str, DeltaCodec, float, float], ...] = (("C1", Int3(), 9.0, 0.05), ("C2", Int2(), 25.0, 0.5))

Flat = NDArray[np.float32]


class Deltas:
    """Deltas through a codec of the site's own scales, with a residual a client; counts bytes."""

    def __init__(self, codec: DeltaCodec, size: int) -> None:
        self.codec, self.layout = codec, Layout.of([Entry("B", "x.lora_B.weight", (size,))])
        self.kept: dict[int, Tensors] = {}
        self.bytes: list[float] = []

    def __call__(self, place: int, client: int, delta: Flat) -> Flat:
        """What arrives of ``delta``."""
        own = Tensors(self.layout, delta)
        message, self.kept[client] = send(self.codec, own, self.kept.get(client), None)
        self.bytes.append(len(message) / delta.size)
        return receive(self.codec, message, own).flat

    def learned(self, mean: Flat) -> None:
        """Scales are the site's own: the mean changes nothing."""


class Narrow:
    """Deltas as a ring's integers, whose scales follow the last mean; the first round has none and sends 32 bits."""

    def __init__(self, ring: Ring, size: int) -> None:
        self.ring, self.grid = ring, Grid(CLIENTS)
        self.layout = Layout.of([Entry("B", "x.lora_B.weight", (size,))])
        self.kept: dict[int, Tensors] = {}
        self.shifts: NDArray[np.uint8] | None = None
        self.bytes: list[float] = []

    def __call__(self, place: int, client: int, delta: Flat) -> Flat:
        """What arrives of ``delta``."""
        whole = Tensors(self.layout, delta) + self.kept.get(client, Tensors.zeros(self.layout))
        update = Update.encode(whole, 1.0, {}, self.grid)
        if self.shifts is None:
            self.bytes.append(4.0)
            return update.mean().flat
        narrow = self.ring.narrow(update.codes, self.shifts, None)
        self.bytes.append(len(pack(narrow, self.ring.width(CLIENTS))) / delta.size)
        lanes = Lanes.told(self.layout, {"B"}, self.ring, self.shifts.tobytes(), self.grid)
        sent, self.kept[client] = lanes.send(update, None)
        return sent.mean().flat

    def learned(self, mean: Flat) -> None:
        """The next round's public scales."""
        self.shifts = self.ring.shifts(mean, self.grid)


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of bytes a value, of the loss that they cost, and of MB of float32 a CPU second."""
    import torch

    torch.set_num_threads(1)
    rows = _quality(markov(ROUNDS["markov"], 0), ROUNDS["markov"], masked=True)
    real = speakers(ROUNDS["speakers"], 0)
    if real is None:
        rows.append(
            {"row": "C1", "case": "Shakespeare's speakers skipped: set FEDPEFT_SHARED to a folder with data/ and models/", "unit": ""}
        )
    else:
        rows += _quality(real, ROUNDS["speakers"], masked=False)
    return rows + _speed(repeats)


def _quality(task: Task, rounds: int, masked: bool) -> list[dict[str, object]]:
    start = task.start()
    first, plain = task.evaluate(start), federate(task, rounds, None)
    rows = []
    for row, codec, goal, allowed in GOALS:
        way = Deltas(codec, start.numel())
        loss = federate(task, rounds, way)
        rows += _pair(row, f"{codec.kind} + EF, {task.name}", way.bytes, _flower(), goal, (first, plain, loss, allowed))
    if masked:
        narrow = Narrow(Ring(4), start.numel())
        loss = federate(task, rounds, narrow, narrow.learned)
        rows += _pair("D4", f"ring of 4-bit values + EF, {task.name}", narrow.bytes, _secagg(), 5.8, (first, plain, loss, 0.5))
    return rows


def _pair(
    row: str, case: str, each: list[float], peer: float, goal: float, losses: tuple[float, float, float, float]
) -> list[dict[str, object]]:
    """Bytes a value, and the share of the improvement that is lost; the second holds when it is at most what is allowed."""
    first, plain, loss, allowed = losses
    ours, lost = float(np.mean(each)), 100 * (loss - plain) / (first - plain)
    share = {"peer": allowed, "ratio": allowed / max(lost, 1e-6), "goal": "ratio >= 1", "unit": f"%, {first:.3f} to {plain:.4f}"}
    return [
        {
            "row": row,
            "case": f"bytes up: {case}",
            "ours": ours,
            "peer": peer,
            "ratio": peer / ours,
            "goal": f"ratio >= {goal}",
            "unit": "B/value",
        },
        {"row": row, "case": f"lost: {case}", "ours": lost, **share},
    ]


def _flower() -> float:
    """Bytes a value of flwr's record of fp32 arrays."""
    from flwr.common.serde import recorddict_to_proto

    layout = layout_of(*SIZES)
    return len(recorddict_to_proto(reply(Tensors.zeros(layout), 1.0)).SerializeToString()) / layout.size


def _secagg() -> float:
    """Bytes a value of a vector as flwr's SecAgg+ sends it: int64 in a ``.npy``."""
    from flwr.common import ndarrays_to_parameters

    size = SIZES[0] * SIZES[1]
    return sum(map(len, ndarrays_to_parameters([np.zeros(size, np.int64)]).tensors)) / size


def _speed(repeats: int) -> list[dict[str, object]]:
    """Writing and reading 1M values; the peer is flwr's record, there and back."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Message

    layout = layout_of(*SIZES)
    delta = Tensors(layout, (np.random.default_rng(0).standard_t(5, layout.size) * 1e-3).astype(np.float32))
    record = recorddict_to_proto(reply(delta, 1.0)).SerializeToString()
    codecs: tuple[DeltaCodec, ...] = (Int8(), Int4(), Int3(), Int2())
    messages = {codec: codec.encode(delta.flat, None) for codec in codecs}
    seed = seed_of("bench")
    works: dict[str, Callable[[], object]] = {
        "peer write": lambda: recorddict_to_proto(reply(delta, 1.0)).SerializeToString(),
        "peer read": lambda: [
            array.numpy()
            for arrays in recorddict_from_proto(Message.FromString(record)).array_records.values()
            for array in arrays.values()
        ],
    }
    for codec in codecs:
        works[f"{codec.kind} write"] = lambda codec=codec: codec.encode(delta.flat, None)  # type: ignore[misc]
        works[f"{codec.kind} write, stochastic"] = lambda codec=codec: codec.encode(delta.flat, seed)  # type: ignore[misc]
        works[f"{codec.kind} read"] = lambda codec=codec: codec.decode(messages[codec], layout.size)  # type: ignore[misc]
    speed = {name: delta.flat.nbytes / 1e6 / seconds for name, seconds in least(works, repeats).items()}
    return [
        {
            "row": "C1",
            "case": f"{name} 1M values",
            "ours": found,
            "peer": speed["peer read" if "read" in name else "peer write"],
            "ratio": found / speed["peer read" if "read" in name else "peer write"],
            "unit": "MB/CPU s",
        }
        for name, found in speed.items()
        if not name.startswith("peer")
    ]


if __name__ == "__main__":
    began = process_time()
    for line in run():
        print(line)
    print(f"{process_time() - began:.0f} CPU s")
