"""Laws of the client's cache and of the landing that streams go to."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.control import files
from fedpeft.control.cache import Cache
from fedpeft.control.staging import STALE, Landing, Staging
from fedpeft.errors import AdapterError, LinkError, StorageError
from fedpeft.registry import Registry
from fedpeft.registry.manifest import NAME, SIGNATURE
from fedpeft.v1.registry_pb2 import Chunk, File


@pytest.fixture(scope="module")
def stocked(tmp_path_factory, made):
    """A registry of four versions, and a function that keeps one of them in a cache."""
    registry = Registry(tmp_path_factory.mktemp("stock") / "registry")
    versions = made.fill(registry, 1, 2, 3, 4)

    def keep(cache, version):
        held = registry.files(version.digest)
        signature, _ = held.pop(SIGNATURE), held.pop(NAME)
        cache.keep(version.manifest, held, signature)

    return registry, versions, keep


def test_what_is_kept_is_read_back_verified_and_only_that(stocked, tmp_path):
    registry, (first, second, *_), keep = stocked
    cache = Cache(tmp_path / "cache")
    assert cache.files(first.digest) is None
    keep(cache, first)
    assert cache.files(first.digest) == registry.files(first.digest)
    assert cache.files(second.digest) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json", "manifest.sig", "router.safetensors"])
def test_a_damaged_version_is_dropped_not_given(stocked, tmp_path, name):
    _, (first, *_), keep = stocked
    cache = Cache(tmp_path / "cache")
    keep(cache, first)
    path = cache.root / "objects" / first.digest / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert cache.files(first.digest) is None
    assert not path.parent.exists()
    keep(cache, first)
    assert cache.files(first.digest) is not None


@settings(max_examples=15)
@given(uses=st.lists(st.integers(0, 3), min_size=1, max_size=12), room=st.integers(0, 4))
def test_the_least_lately_used_leave_and_the_rest_fits(uses, room, tmp_path_factory, stocked):
    registry, versions, keep = stocked
    size = sum(len(data) for data in registry.files(versions[0].digest).values()) + 64
    cache, oracle = Cache(tmp_path_factory.mktemp("cache"), room * size), []
    for tick, place in enumerate(uses):
        digest = versions[place].digest
        if cache.files(digest) is None:
            keep(cache, versions[place])
        os.utime(cache.root / "objects" / digest, (tick, tick))
        cache.evict(digest)
        oracle = [*(known for known in oracle if known != place), place][-room:] if room else []
        assert set(cache.objects.store.names()) == {versions[known].digest for known in oracle}


SIZES = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50), min_size=1)


@settings(max_examples=40)
@given(sizes=SIZES, step=st.integers(1, 20), offset=st.integers(0, 220))
def test_spans_cover_the_rest_of_the_stream_once(sizes, step, offset):
    whole = [(name, place) for name, size in sizes.items() for place in range(size)]
    found = list(files.spans(sizes, offset, step))
    assert [(name, place) for name, start, end, _ in found for place in range(start, end)] == whole[offset:]
    assert all(0 < end - start <= step for _, start, end, _ in found)
    assert [place for *_, place in found] == sorted({place for *_, place in found})
    assert all(place == offset or place > offset for *_, place in found)


@settings(max_examples=40)
@given(content=st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=40), min_size=1), data=st.data())
def test_a_stream_that_breaks_anywhere_lands_whole(content, data, tmp_path_factory, made):
    sizes, staging = {name: len(value) for name, value in content.items()}, Staging(tmp_path_factory.mktemp("staging"))
    wanted = {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}
    for last in (False, False, True):
        with staging.landing("x", sizes) as landing:
            offset = landing.offset
            chunks = list(files.spans(sizes, offset, 7))
            for name, start, end, place in chunks if last else chunks[: data.draw(st.integers(0, len(chunks)))]:
                offset = landing.write(made.chunk(content[name][start:end], place), offset)
            assert landing.offset == offset
            if offset < landing.total:
                with pytest.raises(LinkError, match=f"ended after {offset} of {landing.total}"):
                    landing.complete(wanted)
            elif last:
                assert {name: landed.path.read_bytes() for name, landed in landing.complete(wanted).items()} == content
                landing.forget()
    assert not (staging.root / "x").exists()


def test_chunks_out_of_place_or_changed_are_refused(tmp_path, made):
    with Staging(tmp_path).landing("x", {"a": 4, "b": 4}) as landing:
        good = made.chunk(b"1234", 0)
        for bad, kind in [
            (made.chunk(b"1234", 1), LinkError),
            (made.chunk(b"", 0), LinkError),
            (made.chunk(b"123456789", 0), LinkError),
            (made.chunk(b"12345", 0), StorageError),
            (Chunk(offset=0, crc=good.crc ^ 1, data=good.data), StorageError),
        ]:
            with pytest.raises(kind):
                landing.write(bad, 0)
        assert landing.write(good, 0) == landing.offset == 4
        with pytest.raises(LinkError, match="expected place 4"):
            landing.write(good, 4)


def test_one_stream_lands_at_a_time_in_bounded_room(tmp_path, made):
    staging = Staging(tmp_path, 10)
    with staging.landing("x", {"a": 8}) as landing:
        landing.write(made.chunk(b"12345678", 0), 0)
        with pytest.raises(LinkError, match="under way"), staging.landing("x", {"a": 8}):
            pass
        with pytest.raises(LinkError, match="would exceed 10"), staging.landing("y", {"a": 3}):
            pass
    with staging.landing("y", {"a": 2}):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    staging.sweep()
    assert staging.here("x", {"a": 8}) == 8
    staging.sweep((tmp_path / "x" / "a").stat().st_mtime + STALE + 1)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_of_another_size_does_not_count(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert Landing(tmp_path, {"a": 4, "b": 1}).offset == 0
    assert Landing(tmp_path, {"a": 5, "b": 1}).offset == 5


@pytest.mark.parametrize("names", [["../a"], ["a", "a"], [""], ["a/b"], ["\0"]])
def test_file_names_are_plain(names):
    with pytest.raises(AdapterError, match="not distinct plain names"):
        files.from_proto([File(name=name, size=1) for name in names], 10)
