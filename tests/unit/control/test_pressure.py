"""A server under pressure: readers that stall, more calls than slots, two hundred pulls at once."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import grpc.aio
import pytest

from fedpeft.control.channel import OPTIONS
from fedpeft.v1 import registry_pb2 as pb
from fedpeft.v1.registry_pb2_grpc import RegistryStub

pytestmark = pytest.mark.integration


def test_a_reader_that_stalls_is_cut_off_and_blocks_nobody(running, far, stub, other):
    running.registry.pull(other, "area")
    running.server.gate.stall = 0.5
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536), ("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{running.port}", small)
    lazy = [RegistryStub(channel).Pull(pb.PullRequest(ref="area")) for _ in range(20)]
    for call in lazy:
        next(call)
    began = time.monotonic()
    assert far.load("area").digest == other.load("area").digest
    assert time.monotonic() - began < 30, "nobody waits for those who stall"
    while +running.server.gate._busy and time.monotonic() - began < 60:
        time.sleep(0.1)
    assert not +running.server.gate._busy, "every slot is free again"
    codes = set()
    for call in lazy:
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        codes.add(caught.value.code().name)
    channel.close()
    assert codes == {"ABORTED"}


def test_more_calls_than_slots_are_turned_away(running, stub, other, far):
    running.registry.pull(other, "area")
    running.server.gate.slots["Pull"] = (1, 1)
    held = stub.Pull(pb.PullRequest(ref="area"))
    next(held)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Pull(pb.PullRequest(ref="area")))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again soon" in caught.value.details()
    threading.Timer(0.5, held.cancel).start()
    assert far.load("area").digest == other.load("area").digest, "the client waits for a slot"


def test_two_hundred_pulls_at_once(running, made):
    made.fill(running.registry, 6, width=40_000)
    digest = running.registry.resolve("area")

    async def all_of_them():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", OPTIONS) as channel:
            asked = RegistryStub(channel)

            async def one():
                return sum([len(part.chunk.data) async for part in asked.Pull(pb.PullRequest(ref=digest), timeout=100)])

            return await asyncio.gather(*(one() for _ in range(200)))

    sizes = running.registry.objects.store.sizes(digest)
    manifest = running.registry.get(digest).manifest
    assert asyncio.run(all_of_them()) == [sum(sizes[name] for name in manifest.files)] * 200
