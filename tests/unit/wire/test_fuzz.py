"""What comes over the wire: named faults only, and no more memory than the message itself takes."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.checksum import checksum
from fedpeft.errors import LinkError, UpdateError
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1 import federation_pb2 as pb

FINGERPRINT = hashlib.sha256(b"layout").hexdigest()
PACKED = flat.pack(FINGERPRINT, np.arange(50, dtype=np.int32))
PLAN = pb.RoundPlan(federation="f", run="r", round=3, tasks=[pb.TaskPlan(task="a", roles=["B"], spec_json="{}", grid_reach=2.0, seed=7)])
REPLY = pb.RoundReply(site="s", run="r", results=[pb.TaskResult(task="a", counters={"n": pb.Values(values=[1.0, 2.0])})])


@given(data=st.data())
def test_spoilt_arrays_are_update_errors(data, spoilt, bounded):
    body = data.draw(spoilt(PACKED))
    with bounded(200_000):
        try:
            _, values = flat.unpack(body)
        except UpdateError:
            return
    assert body == PACKED
    assert values.size == 50


@given(size=st.integers(0, 2**64 - 1), tag=st.sampled_from([b"<i4\0", b"<f4\0", b"|O\0\0", b"<f8\0"]), body=st.binary(max_size=64))
def test_a_header_that_promises_anything_allocates_nothing(size, tag, body, bounded):
    head = flat.HEAD.pack(flat.MAGIC, tag, size, bytes.fromhex(FINGERPRINT))
    message = head + checksum(head, body) + body
    with bounded(200_000):
        if tag in flat.TYPES and size * 4 == len(body):
            assert flat.unpack(message)[1].tobytes() == body
        else:
            with pytest.raises(UpdateError):
                flat.unpack(message)


@pytest.mark.parametrize("message", [PLAN, REPLY], ids=["plan", "reply"])
@given(data=st.data())
def test_spoilt_bodies_parse_or_are_update_errors(message, data, spoilt, bounded):
    body = data.draw(spoilt(message.SerializeToString()))
    with bounded(1_000_000), contextlib.suppress(UpdateError):
        Envelope("train", body).open(type(message))


def test_deeply_nested_groups_do_not_exhaust_the_stack():
    with pytest.raises(UpdateError):
        Envelope("train", b"\x0b" * 100_000).open(pb.RoundPlan)


RECORD = st.one_of(st.integers(-5, 5), st.text(max_size=6), st.binary(max_size=6), st.lists(st.integers(0, 5), max_size=3))


@given(kind=RECORD, body=RECORD, stype=st.sampled_from(["fedpeft.flat.v1", "numpy.ndarray", ""]), raw=st.binary(max_size=40))
def test_foreign_flower_records_are_link_errors_or_envelopes(kind, body, stype, raw):
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from fedpeft.wire.flower import from_records

    records = RecordDict(
        {"fedpeft": ConfigRecord({"kind": kind, "body": body}), "arrays": ArrayRecord({"a": Array("uint8", (1 << 40,), stype, raw)})}
    )
    try:
        envelope = from_records(records)
    except LinkError:
        return
    with pytest.raises(UpdateError):
        envelope.array("a", FINGERPRINT)


CHILD = """
import resource, random, struct
import numpy as np
from fedpeft.errors import UpdateError
from fedpeft.wire import flat
resource.setrlimit(resource.RLIMIT_AS, (int({limit}), int({limit})))
pick, packed = random.Random(0), flat.pack("00" * 32, np.arange(64, dtype=np.float32))
for _ in range(20000):
    body = bytearray(packed)
    for _ in range(pick.randint(1, 6)):
        body[pick.randrange(len(body))] = pick.randrange(256)
    try:
        flat.unpack(bytes(body[: pick.randint(0, len(body))]))
    except UpdateError:
        pass
print("held")
"""


def test_twenty_thousand_spoilt_arrays_fit_in_a_small_process():
    done = subprocess.run([sys.executable, "-c", CHILD.format(limit=3e9)], capture_output=True, text=True, timeout=100)
    assert done.stdout == "held\n", done.stderr[-500:]
