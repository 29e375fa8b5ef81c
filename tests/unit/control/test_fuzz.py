"""Bytes from outside: whatever comes, a named fault, bounded memory, and a server that goes on."""

from __future__ import annotations

import contextlib
import json

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.certificates import holder, signed_by
from fedpeft.control import bounds, transfer
from fedpeft.control.address import Address
from fedpeft.control.faults import CODES, code_of
from fedpeft.control.link import Link
from fedpeft.errors import AdapterError, ConfigError, FedpeftError, LinkError, StorageError
from fedpeft.registry import Registry
from fedpeft.registry.manifest import NAME, SIGNATURE
from fedpeft.v1 import federation_pb2, registry_pb2, router_pb2
from fedpeft_coordinator.control.federation import read

KINDS = [
    getattr(module, name)
    for module in (registry_pb2, router_pb2, federation_pb2)
    for name in module.DESCRIPTOR.message_types_by_name
    if name.endswith(("Request", "PushPart"))
]


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), data=st.binary(max_size=200))
def test_any_bytes_are_no_message_or_a_bounded_one(kind, data, bounded):
    with bounded(20_000_000), contextlib.suppress(DecodeError, AdapterError):
        message = kind.FromString(data)
        bounds.check(message)
        assert message.ByteSize() <= bounds.MESSAGE


@pytest.fixture(scope="module")
def row(tmp_path_factory, made):
    """A version as it travels."""
    registry = Registry(tmp_path_factory.mktemp("fuzz") / "registry")
    (version,) = made.fill(registry, 1)
    held = registry.files(version.digest)
    return registry_pb2.Version(
        task="area", number=1, digest=version.digest, action="publish", created="t", manifest=held[NAME], signature=held[SIGNATURE]
    ), held["router.safetensors"]


@settings(max_examples=100)
@given(data=st.data())
def test_a_spoilt_version_is_a_storage_error_or_the_same_version(data, row, spoilt, bounded):
    good = row[0]
    with bounded(20_000_000), contextlib.suppress(DecodeError, StorageError):
        bad = registry_pb2.Version.FromString(data.draw(spoilt(good.SerializeToString())))
        assert transfer.version(bad).manifest == transfer.version(good).manifest


@settings(max_examples=100)
@given(data=st.data())
def test_spoilt_cards_are_named(data, row, spoilt, bounded, made):
    version, card = row
    stream = [router_pb2.CardPart(version=version), router_pb2.CardPart(chunk=made.chunk(card, 0))]
    place = data.draw(st.integers(0, 1))
    with bounded(20_000_000), contextlib.suppress(DecodeError, FedpeftError):
        stream[place] = router_pb2.CardPart.FromString(data.draw(spoilt(stream[place].SerializeToString())))
        found = transfer.cards(data.draw(st.permutations(stream)))
        assert found.keys() <= {"area"}


@given(text=st.one_of(st.text(max_size=40), st.from_regex(r"grpc://[a-z0-9.:\[\]]{0,20}:[0-9]{0,6}/?")))
def test_addresses(text):
    with contextlib.suppress(ConfigError):
        found = Address.parse(text)
        assert 0 < found.port < 1 << 16
        assert Address.parse(str(found)) == found


@settings(max_examples=60)
@given(data=st.data())
def test_certificates(data, spoilt, certificates):
    good = (certificates / "ours/reader-ann.pem").read_bytes()
    bad = data.draw(st.one_of(spoilt(good), st.binary(max_size=99)))
    with contextlib.suppress(ValueError):
        assert holder(bad).role in ("reader", "")
    signed_by(bad, good)


@settings(max_examples=60)
@given(data=st.binary(max_size=300), position=st.integers(0, 400))
def test_event_files(data, position, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "events"
    path.write_bytes(json.dumps({"time": 1.0, "event": "x", "more": 2}).encode() + b"\n" + data)
    for event in read(path, position):
        assert position < event.position <= path.stat().st_size
        assert isinstance(json.loads(event.facts), dict)


def test_every_error_has_a_status():
    assert all(code in grpc.StatusCode.__members__ for code in CODES.values())
    assert code_of(FedpeftError("x")) == "FAILED_PRECONDITION"


@pytest.mark.integration
def test_a_server_goes_on_after_garbage(serve, made, tmp_path):
    import random
    import socket

    running, chance = serve(), random.Random(3)
    made.fill(running.registry, 1)
    for place in range(30):
        with socket.create_connection(("127.0.0.1", running.port)) as plain, contextlib.suppress(OSError):
            plain.sendall((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if place % 2 else b"") + chance.randbytes(200))
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        for method in ("Get", "List", "Rollback", "SetAlias", "Staged"):
            raw = channel.unary_unary(f"/fedpeft.v1.Registry/{method}")
            for _ in range(20):
                with contextlib.suppress(grpc.RpcError):
                    raw(chance.randbytes(chance.randrange(60)), timeout=5)
        push = channel.stream_unary("/fedpeft.v1.Registry/Push")
        for _ in range(20):
            with contextlib.suppress(grpc.RpcError):
                push(iter([chance.randbytes(chance.randrange(80)) for _ in range(3)]), timeout=5)
    with running.far(tmp_path / "cache").link as link:
        assert link.unary("Registry", "Get", registry_pb2.GetRequest(ref="area")).number == 1
    assert running.registry.verify() == ()


def test_nobody_there_is_a_link_error(free_port):
    with Link(Address("127.0.0.1", free_port)) as link, pytest.raises(LinkError, match=r"cannot be reached: Connection refused"):
        link.unary("Registry", "Get", registry_pb2.GetRequest(ref="area"))
