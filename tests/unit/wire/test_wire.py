"""The wire: flat arrays, envelopes, and their Flower form."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft.errors import LinkError, UpdateError
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1 import federation_pb2 as pb

FINGERPRINT = hashlib.sha256(b"layout").hexdigest()
arrays = st.sampled_from([np.int32, np.float32, np.uint8]).flatmap(lambda kind: hnp.arrays(kind, st.integers(0, 200)))


@given(arrays)
def test_unpack_inverts_pack_bit_for_bit(array):
    layout, back = flat.unpack(flat.pack(FINGERPRINT, array))
    assert layout == FINGERPRINT
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@given(arrays, st.data())
def test_any_changed_byte_is_refused(array, data):
    packed = bytearray(flat.pack(FINGERPRINT, array))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(UpdateError):
        flat.unpack(bytes(packed))


@given(st.binary(max_size=300))
def test_garbage_is_refused_not_crashed_on(data):
    with pytest.raises(UpdateError):
        flat.unpack(data)


@given(arrays, st.integers(0, 500))
def test_truncation_is_refused(array, keep):
    packed = flat.pack(FINGERPRINT, array)
    if keep < len(packed):
        with pytest.raises(UpdateError):
            flat.unpack(packed[:keep])


def test_other_types_are_refused():
    with pytest.raises(UpdateError, match="float64"):
        flat.pack(FINGERPRINT, np.zeros(3))


def test_envelope_round_trip_through_flower_records():
    from fedpeft.wire.flower import from_records, to_records

    plan = pb.RoundPlan(federation="f", run="r", round=3, tasks=[pb.TaskPlan(task="area", roles=["B", "head"])])
    envelope = Envelope.of("train", plan, {"area": flat.pack(FINGERPRINT, np.arange(5, dtype=np.int32))})
    back = from_records(to_records(envelope))
    assert back == envelope
    assert back.open(pb.RoundPlan) == plan
    assert back.array("area", FINGERPRINT).tolist() == [0, 1, 2, 3, 4]


def test_foreign_records_are_a_link_error():
    from flwr.app import ConfigRecord, RecordDict

    from fedpeft.wire.flower import from_records

    with pytest.raises(LinkError, match="version"):
        from_records(RecordDict({"config": ConfigRecord({"lr": 0.1})}))


@given(st.binary(max_size=200))
def test_malformed_bodies_are_refused_or_parsed_never_crash(body):
    with contextlib.suppress(UpdateError):
        Envelope("train", body).open(pb.RoundPlan)
