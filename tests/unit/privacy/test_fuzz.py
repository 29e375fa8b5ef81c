"""Messages of secure aggregation from a hostile site or coordinator: `PrivacyError` or the same sum, never a crash, never a release."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError, StorageError
from fedpeft.privacy.accounting import Event
from fedpeft.privacy.ledger import Budget, Charge, Ledger
from fedpeft.privacy.packing import Schema, unpack
from fedpeft.privacy.secagg import Box, Bundle, Collector, Instance, Member, Reveal, shamir
from fedpeft.tensors import Entry, Layout
from fedpeft.update import Grid
from fedpeft.wire import masking
from fedpeft.wire.v1 import federation_pb2 as pb

NAMES = ("a", "b", "c", "d")
INSTANCE = Instance("run/1/0/task/train", NAMES)
KEY = st.one_of(st.binary(max_size=40), st.just(bytes(32)), st.just(b"\x01" + bytes(31)), st.just(b"\xff" * 32))
NAME = st.one_of(st.sampled_from([*NAMES, "", "z", "\0", "a\n"]), st.text(max_size=5))
SHARES = st.dictionaries(NAME, KEY, max_size=4)


@given(
    name=st.text(max_size=9), members=st.lists(NAME, max_size=6), colluding=st.floats(), dropping=st.floats(),
    least=st.sampled_from([-1, 0, 2, 3, 5, 10**9, 2**32 - 1]),
)  # fmt: skip
def test_any_instance_is_refused_or_whole(name, members, colluding, dropping, least, bounded):
    with bounded(2_000_000), contextlib.suppress(PrivacyError):
        message = pb.Instance(name=name, members=members, colluding=colluding, dropping=dropping, least=least % 2**32)
        made = masking.instance_of(message)
        assert set(made.graph) == set(members)
        assert len(members) >= 3
        assert all(1 <= made.shape.threshold <= len(near) for near in made.graph.values())


@pytest.mark.parametrize(("kind", "read"), [(pb.Bundle, masking.bundle_of), (pb.Instance, masking.instance_of)])
@given(data=st.data())
def test_spoilt_messages_are_privacy_errors(kind, read, data, spoilt):
    whole = {
        pb.Bundle: pb.Bundle(site="a", mask_key=bytes(32), box_key=bytes(32), seed_check=bytes(32), signature=b"s"),
        pb.Instance: masking.instance_message(INSTANCE),
    }[kind]
    message = kind()
    with contextlib.suppress(PrivacyError):
        with contextlib.suppress(DecodeError):  # the envelope names this one
            message.ParseFromString(data.draw(spoilt(whole.SerializeToString())))
        read(message)


@given(site=NAME, mask_key=KEY, box_key=KEY, check=KEY, signature=st.binary(max_size=99))
def test_the_coordinator_takes_any_bundle(site, mask_key, box_key, check, signature):
    collector = Collector(INSTANCE)
    with contextlib.suppress(PrivacyError):
        collector.add_bundle(Bundle(site, mask_key, box_key, check, signature))
        assert site in NAMES


@given(bundles=st.lists(st.builds(Bundle, NAME, KEY, KEY, KEY, st.binary(max_size=40)), max_size=5))
def test_a_site_deals_nothing_on_forged_bundles(bundles):
    member = Member(INSTANCE, "a")
    with pytest.raises(PrivacyError):
        member.deal(bundles, {name: "ab" * 32 for name in NAMES})


@given(site=NAME, boxes=st.lists(st.builds(Box, NAME, NAME, st.binary(max_size=80)), max_size=4))
def test_the_coordinator_takes_any_boxes(site, boxes):
    collector = Collector(INSTANCE)
    with pytest.raises(PrivacyError):
        collector.add_boxes(site, boxes)


@given(site=NAME, seed=KEY, seeds=SHARES, keys=SHARES)
def test_the_coordinator_takes_any_reveal(site, seed, seeds, keys):
    collector = Collector(INSTANCE)
    with pytest.raises(PrivacyError):
        collector.add_reveal(Reveal(site, seed, seeds, keys))


def test_a_share_of_no_neighbour_is_refused(play):
    one = play(10, {}, colluding=0.0, dropping=0.0)
    one.keyed()
    one.dealt()
    one.masked({name: np.zeros(2, np.int32) for name in one.members})
    one.agreed()
    first = sorted(one.members)[0]
    stranger = next(name for name in one.members if name != first and name not in one.instance.graph[first])
    reveal = one.members[first].reveal(one.collector.signatures_for(first), one.pins)
    with pytest.raises(PrivacyError, match="nobody dealt"):
        one.collector.add_reveal(Reveal(first, reveal.seed, {**reveal.seeds, stranger: bytes(32)}, reveal.keys))
    one.collector.add_reveal(reveal)


@given(shares=st.dictionaries(st.integers(1, 6), KEY.filter(len), max_size=6), threshold=st.integers(1, 5))
def test_any_shares_combine_or_are_refused(shares, threshold):
    with contextlib.suppress(PrivacyError):
        assert len(shamir.combine(shares, threshold)) == shamir.SIZE


@given(data=st.data())
def test_a_torn_machine_is_a_privacy_error(data, tables, spoilt):
    whole = Member(INSTANCE, "a").to_bytes()
    body = data.draw(st.one_of(spoilt(whole), tables(json.loads(whole)).map(lambda table: json.dumps(table).encode())))
    with contextlib.suppress(PrivacyError):
        Member.from_bytes(body)


@given(data=st.data())
def test_a_torn_collector_is_a_privacy_error(data, tables, spoilt):
    whole = Collector(
        INSTANCE, {"a": Bundle("a", bytes(32), bytes(32), bytes(32))}, {"a": {"b": Box("a", "b", b"")}}, None, {"a": None}
    ).to_bytes()
    body = data.draw(st.one_of(spoilt(whole), tables(json.loads(whole)).map(lambda table: json.dumps(table).encode())))
    with contextlib.suppress(PrivacyError):
        Collector.from_bytes(body, np.zeros(3, np.int32))


SCHEMA = Schema(Layout.of([Entry("B", "b", (2, 2))]), Grid(4), {"n": 2})


@given(codes=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=0, max_size=20), count=st.integers(0, 5))
def test_any_sum_unpacks_or_is_refused(codes, count):
    with contextlib.suppress(PrivacyError):
        found = unpack(np.array(codes, np.int32), SCHEMA, count)
        assert 0 < found.weight <= count


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Ledger:
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    for number in range(3):
        ledger.spend(Charge(f"round/{number}", "area", "adapter", Event(4.0, concentrated=True)), Budget(100.0, 1e-5))
    return ledger


@given(data=st.data())
def test_a_garbled_ledger_is_a_storage_error_or_a_shorter_one(kept, data, tables, spoilt, tmp_path_factory):
    """A line that was changed is named; lines cut off at the end are found by the head that others keep."""
    lines = kept.path.read_bytes().splitlines()
    place = data.draw(st.integers(0, 2))
    table = tables(json.loads(lines[place])).map(lambda table: json.dumps(table).encode())
    lines[place] = data.draw(st.one_of(spoilt(lines[place]), table, st.just(b"[" * 9999), st.just(b'{"hash": ' + b"9" * 5000 + b"}")))
    spoiled = Ledger(tmp_path_factory.mktemp("spoiled"))
    (spoiled.folder / "keys").symlink_to(kept.keys.folder)
    spoiled.path.write_bytes(b"".join(line + b"\n" for line in lines))
    try:
        found = spoiled.entries()
    except StorageError:
        assert spoiled.verify()
        return
    assert found == kept.entries()[: len(found)]
    assert len(found) == 3 or spoiled.verify(kept.head())
