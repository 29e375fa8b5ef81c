"""C3: one adapter of 1 M float32 values in 224 tensors to bytes and back, our flat message against flwr's records.

Peers: flwr's ``Array`` (``.npy``) in a protobuf ``ArrayRecord``; and, where the checksum is part of the work, the objects that flwr
1.41 really pushes and pulls, each named by its SHA-256. Ours: `fedpeft.wire.flat` with its checksum, and the same code with the
digest left out. One thread, interleaved, least CPU time; memcpy of the same bytes is the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.serde import array_record_from_proto, array_record_to_proto
from flwr.proto.recorddict_pb2 import ArrayRecord as ArrayRecordMessage
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.wire import flat

ARRAYS, SIZE, LOOPS = 224, 4464, 5
GOALS = {False: 50.0, True: 10.0}

Work = Callable[[], Any]


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of MB of float32 values per CPU second, each way, without and with an integrity hash."""
    layout = Layout.of([Entry("B", f"layers.{place:03}.lora_B.weight", (SIZE,)) for place in range(ARRAYS)])
    tensors = Tensors(layout, np.random.default_rng(0).standard_normal(layout.size, np.float32))
    works = _works(tensors)
    least = {name: float("inf") for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            least[name] = min(least[name], _seconds(work))
    megabytes = tensors.flat.nbytes / 1e6
    return [
        _row(way, hashed, {name: megabytes / seconds for name, seconds in least.items()}) for hashed in GOALS for way in ("pack", "parse")
    ]


def _row(way: str, hashed: bool, speed: dict[str, float]) -> dict[str, object]:
    name = f"{way}, hash" if hashed else way
    ours, peer, goal = speed[f"ours {name}"], speed[f"peer {name}"], GOALS[hashed]
    return {
        "row": "C3",
        "case": f"wire_serde {way} 1M values in {ARRAYS} arrays, {'checksum included' if hashed else 'no checksum'}",
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "floor": speed["memcpy"],
        "goal": f"ratio >= {goal:.0f}",
        "held": ours / peer >= goal,
        "unit": "MB/CPU s",
    }


def _works(tensors: Tensors) -> dict[str, Work]:
    fingerprint, message = tensors.layout.fingerprint, flat.pack(tensors.layout.fingerprint, tensors.flat)
    plain, pushed = _flower_pack(tensors), _flower_push(tensors)
    works: dict[str, Work] = {
        "ours pack": lambda: _unhashed(fingerprint, tensors),
        "ours parse": lambda: flat.unpack(message, verify=False),
        "ours pack, hash": lambda: flat.pack(fingerprint, tensors.flat),
        "ours parse, hash": lambda: flat.unpack(message),
        "peer pack": lambda: _flower_pack(tensors),
        "peer parse": lambda: _flower_parse(plain),
        "peer pack, hash": lambda: _flower_push(tensors),
        "peer parse, hash": lambda: _flower_pull(*pushed),
        "memcpy": lambda: tensors.flat.copy(),
    }
    for way in ("ours parse", "ours parse, hash"):
        np.testing.assert_array_equal(works[way]()[1], tensors.flat)
    for way in ("peer parse", "peer parse, hash"):
        np.testing.assert_array_equal(np.concatenate(works[way]()), tensors.flat)
    return works


def _unhashed(fingerprint: str, tensors: Tensors) -> bytes:
    with patch.object(flat, "checksum", lambda _head, _body: bytes(flat.HEADER - flat.HEAD.size)):
        return flat.pack(fingerprint, tensors.flat)


def _record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in tensors.named().items()})


def _flower_pack(tensors: Tensors) -> bytes:
    return array_record_to_proto(_record(tensors)).SerializeToString()


def _flower_parse(data: bytes) -> list[Any]:
    return [array.numpy() for array in array_record_from_proto(ArrayRecordMessage.FromString(data)).values()]


def _flower_push(tensors: Tensors) -> tuple[str, dict[str, bytes]]:
    record = _record(tensors)
    return record.object_id, {name: item.deflate() for name, item in get_all_nested_objects(record).items()}


def _flower_pull(root: str, contents: dict[str, bytes]) -> list[Any]:
    record: Any = inflate_object_from_contents(root, dict(contents))
    return [array.numpy() for array in record.values()]


def _seconds(work: Work) -> float:
    began = process_time()
    for _ in range(LOOPS):
        work()
    return (process_time() - began) / LOOPS


if __name__ == "__main__":
    for row in run():
        print(row)
