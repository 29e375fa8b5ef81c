"""Versions that travel over a real socket, up and down: whole or not at all, whatever comes or is cut off."""

from __future__ import annotations

from dataclasses import replace

import grpc
import grpc.aio
import pytest

from fedpeft.control import bounds, files
from fedpeft.errors import StorageError
from fedpeft.registry import Manifest, Registry, judging
from fedpeft.registry.manifest import NAME, SIGNATURE
from fedpeft.v1 import registry_pb2 as pb
from fedpeft.v1.registry_pb2_grpc import RegistryStub
from fedpeft_coordinator.control import registry as service

pytestmark = pytest.mark.integration


def same(one, two):
    return replace(one, path=None) == replace(two, path=None)


def parts(source, ref="area", change=lambda _place, data: data, **head):
    """The messages of a push."""
    found = source.get(ref)
    held = source.files(found.digest)
    content = {name: held[name] for name in sorted(found.manifest.files)}
    sizes = {name: len(data) for name, data in content.items()}
    values = {"manifest": held[NAME], "signature": held[SIGNATURE], "files": files.to_proto(sizes), **head}
    yield pb.PushPart(head=pb.PushHead(**values))
    for name, start, end, place in files.spans(sizes, 0):
        part = pb.PushPart()
        files.fill(part.chunk, change(place, content[name][start:end]), place)
        yield part


def refused(running, stub, messages, code):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Push(iter(messages), timeout=30)
    assert caught.value.code().name == code, caught.value.details()
    assert len(running.registry.list()) == 2
    assert len(running.registry.objects.store.names()) == 2
    return caught.value.details()


def staged(running):
    return sorted(path.name for path in (running.server.state / "staging").glob("*/*") if path.name != ".lock")


def test_a_push_is_published_once_with_its_signature(running, far, other, monkeypatch):
    monkeypatch.setattr(judging, "sha256", lambda _data: 1 / 0)  # what was hashed as it came is not hashed again
    pushed = far.push(other, "area")
    assert (pushed.number, pushed.action, pushed.digest) == (3, "push", other.resolve("area"))
    assert same(far.push(other, "area"), pushed)
    assert running.registry.load("area").digest == other.load("area").digest
    assert running.registry.verify() == ()
    assert staged(running) == []


def test_a_truncated_push_publishes_nothing_and_goes_on_where_it_stopped(running, far, stub, other):
    whole = list(parts(other))
    assert "ended after" in refused(running, stub, whole[:3], "UNAVAILABLE")
    sizes = [message.chunk for message in whole[1:3]]
    here = stub.Staged(pb.StagedRequest(digest=other.resolve("area"), files=whole[0].head.files))
    assert here.offset == sum(len(chunk.data) for chunk in sizes) > 0
    assert "expected place" in refused(running, stub, whole, "UNAVAILABLE"), "what is here is not taken again"
    assert far.push(other, "area").number == 3
    assert staged(running) == []


def test_what_was_tampered_with_is_refused_and_forgotten(running, stub, other):
    flipped = list(parts(other))
    flipped[1].chunk.crc ^= 1
    assert "was changed on its way" in refused(running, stub, flipped, "DATA_LOSS")
    lying = parts(other, change=lambda place, data: data[:-1] + bytes([data[-1] ^ 1]) if place else data)
    assert "do not have the SHA-256" in refused(running, stub, lying, "DATA_LOSS")
    assert staged(running) == []
    forged = other.get("area").manifest.to_bytes().replace(b'"round":5', b'"round":6')
    assert "does not match" in refused(running, stub, parts(other, manifest=forged), "PERMISSION_DENIED")
    assert "canonical" in refused(running, stub, parts(other, manifest=other.get("area").manifest.to_bytes() + b" "), "INVALID_ARGUMENT")
    assert "torn" in refused(running, stub, parts(other, manifest=b"{"), "DATA_LOSS")
    assert "torn" in refused(running, stub, [], "DATA_LOSS")


@pytest.mark.parametrize(
    ("size", "code", "detail"),
    [
        (bounds.CHUNK + 1, "INVALID_ARGUMENT", "data has 1048577 bytes; at most 1048576"),
        (bounds.MESSAGE + 1, "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_an_oversized_part_of_a_push_is_refused_and_nothing_that_came_is_lost(running, far, other, size, code, detail):
    whole = list(parts(other))
    huge = pb.PushPart()
    files.fill(huge.chunk, bytes(size), sum(len(part.chunk.data) for part in whole[1:3]))
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.max_send_message_length", -1)]) as channel:
        assert detail in refused(running, RegistryStub(channel), [*whole[:3], huge], code)
    asked = pb.StagedRequest(digest=other.resolve("area"), files=whole[0].head.files)
    kept = far.link.unary("Registry", "Staged", asked).offset
    assert kept == (0 if code == "INVALID_ARGUMENT" else huge.chunk.offset), "what was refused is forgotten, what broke goes on"
    assert far.push(other, "area").number == 3
    assert running.registry.verify() == ()
    assert staged(running) == []


@pytest.mark.parametrize("times", [1, 99])
def test_a_pull_that_is_tampered_with_on_its_way_heals_or_is_not_believed(running, far, other, monkeypatch, times):
    running.registry.pull(other, "area")
    real, left = service.RegistryService._chunk, [times]

    def chunk(self, digest, span):
        part = real(self, digest, span)
        if span[3] and left[0]:
            left[0] -= 1
            part.chunk.data = part.chunk.data[:-1] + bytes([part.chunk.data[-1] ^ 1])
        return part

    monkeypatch.setattr(service.RegistryService, "_chunk", chunk)
    if times == 1:
        assert far.load("area").digest == other.load("area").digest
        return
    with pytest.raises(StorageError, match=r"was changed on its way \(CRC-32"):
        far.load("area")
    assert list(far.cache.root.glob("objects/*")) == []


def test_strangers_other_bases_and_large_versions_are_refused_before_a_byte_is_taken(running, stub, made, other, tmp_path, monkeypatch):
    stranger = Registry(tmp_path / "stranger")
    made.fill(stranger, 7)
    assert "fedpeft adapters trust" in refused(running, stub, parts(stranger), "PERMISSION_DENIED")
    found = made.adapter(8)
    foreign = replace(found, spec=replace(found.spec, base="e" * 64))
    other.publish(foreign, Manifest(), "foreign")
    assert "was trained on base eeeeeeeeeeee" in refused(running, stub, parts(other), "FAILED_PRECONDITION")
    huge = [pb.File(name=name, size=1 << 40) for name in other.get("area").manifest.files]
    assert "control.max_version" in refused(running, stub, parts(other, files=huge), "INVALID_ARGUMENT")
    assert not (running.server.state / "staging").exists()


def test_a_damaged_version_is_not_believed(running, far):
    path = running.registry.get("area").path / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError, match="do not have the SHA-256"):
        far.files(running.registry.resolve("area"))
    assert list(far.cache.root.glob("objects/*")) == []


def test_a_pull_goes_on_from_any_byte(running, stub, other):
    running.registry.pull(other, "area")
    whole = b"".join(part.chunk.data for part in stub.Pull(pb.PullRequest(ref="area")))
    for offset in (0, 1, bounds.CHUNK, len(whole) - 1, len(whole), len(whole) + 1):
        head, *chunks = stub.Pull(pb.PullRequest(ref="area", offset=offset))
        begins = offset if offset <= len(whole) else 0
        assert head.head.offset == begins
        assert b"".join(part.chunk.data for part in chunks) == whole[begins:]
        assert all(len(part.chunk.data) <= bounds.CHUNK for part in chunks)
