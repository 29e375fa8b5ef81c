"""Laws of stores and histories, and a whole registry over each pair of them.

Stores are also tested behind the URL in FEDPEFT_TEST_STORE, where it names one, such as s3://bucket.
"""

from __future__ import annotations

import os
import threading
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fedpeft.errors import StorageError
from fedpeft.registry import Manifest, Registry, open_store
from fedpeft.registry.histories import FileHistories
from fedpeft.registry.store import FolderStore, UrlStore

FILES = {"adapter_model.safetensors": b"0123456789", "manifest.json": b"{}", "manifest.sig": b"s"}


REMOTE = os.environ.get("FEDPEFT_TEST_STORE", "")
NEEDS = pytest.mark.skipif(not REMOTE, reason="set FEDPEFT_TEST_STORE to an fsspec URL, such as s3://bucket")


@pytest.fixture(params=["folder", "memory", "file", pytest.param("remote", marks=NEEDS)])
def store(request, tmp_path):
    made = {"folder": tmp_path / "here", "memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/there"}
    made["remote"] = f"{REMOTE}/{uuid.uuid4().hex}"
    return open_store(made[request.param])


def test_a_plain_path_is_a_folder_and_a_url_is_fsspec(tmp_path):
    assert open_store(tmp_path) == FolderStore(tmp_path / "objects")
    assert isinstance(open_store("memory://x"), UrlStore)
    with pytest.raises(StorageError, match=r"nosuch://x/objects: cannot be opened"):
        open_store("nosuch://x")


def test_a_folder_is_put_once_read_in_ranges_and_dropped(store):
    assert store.names() == ()
    assert store.sizes("a") == {}
    assert store.put("a", FILES)
    assert not store.put("a", {**FILES, "manifest.json": b"other"})
    assert store.get("a", "manifest.json") == b"{}"
    name = "adapter_model.safetensors"
    assert [store.get("a", name, *span) for span in [(), (3,), (3, 5), (0, 4), (8, 99), (20, 30)]] == [
        b"0123456789",
        b"3456789",
        b"34",
        b"0123",
        b"89",
        b"",
    ]
    assert store.sizes("a") == {file: len(data) for file, data in FILES.items()}
    store.put("b", FILES)
    assert store.names() == ("a", "b")
    store.drop("a")
    store.drop("a")
    assert (store.names(), store.sizes("a")) == (("b",), {})
    with pytest.raises(StorageError, match=r"manifest.json"):
        store.get("a", "manifest.json")
    assert store.put("a", FILES)


def test_files_may_be_given_as_paths(store, tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 100)
    assert store.put("a", {**FILES, "adapter_model.safetensors": tmp_path / "big"})
    assert store.get("a", "adapter_model.safetensors") == b"x" * 100


def test_without_its_manifest_a_folder_behind_a_url_is_not_there():
    store = UrlStore(f"memory://{uuid.uuid4().hex}")
    filesystem, root = store._place
    filesystem.pipe_file(f"{root}/a/adapter_model.safetensors", b"half")
    assert (store.sizes("a"), store.names()) == ({}, ())
    assert store.put("a", FILES)
    assert store.get("a", "adapter_model.safetensors") == b"0123456789"


def test_a_line_is_appended_at_its_place_or_not_at_all(tmp_path):
    lists, before = FileHistories(tmp_path), FileHistories(tmp_path).stamp()
    assert lists.lines("refs/a/log") == []
    assert not lists.append("refs/a/log", 1, b"early")
    assert lists.append("refs/a/log", 0, b"one")
    assert not lists.append("refs/a/log", 0, b"late")
    assert lists.lines("refs/a/log") == [b"one"]
    assert lists.names() == ("refs/a/log",)
    assert lists.stamp() != before


def test_of_many_writers_at_one_place_one_wins(tmp_path):
    won, together = [], threading.Barrier(8)

    def write(mark):
        together.wait()
        if FileHistories(tmp_path).append("refs/a/log", 0, mark):
            won.append(mark)

    threads = [threading.Thread(target=write, args=(str(place).encode(),)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FileHistories(tmp_path).lines("refs/a/log") == won
    assert len(won) == 1


def test_a_registry_over_any_store_is_the_same_registry(store, tmp_path, make_adapter):
    registry = Registry(tmp_path / "registry", store)
    first = registry.publish(make_adapter(1), Manifest(round=1), "run/1")
    registry.publish(make_adapter(2), Manifest(round=2), "run/2")
    assert registry.publish(make_adapter(1), Manifest(round=1), "run/1") == first
    assert registry.load("area@1").digest == make_adapter(1).digest
    assert registry.rollback("area", "1").digest == first.digest
    assert registry.verify() == ()
    registry.export("area", tmp_path / "out")
    store.drop(first.digest)
    assert registry.verify() == (f"{store.where(first.digest)}: the version's folder is missing",)
    registry.publish(make_adapter(1), Manifest(round=1), "run/1")
    assert registry.verify() == ()


class Buckets(MemoryFileSystem):
    """As S3 is: a file needs a bucket, and who makes a folder makes its bucket."""

    protocol = ("s3", "s3a")

    def makedirs(self, path, exist_ok=False):
        self.made.append(path)

    def pipe_file(self, path, value, **settings):
        if path.strip("/").partition("/")[0] not in self.made:
            raise FileNotFoundError("The specified bucket does not exist")
        super().pipe_file(path, value, **settings)


def test_a_missing_bucket_is_refused_by_name_and_not_made():
    store, filesystem = UrlStore("s3://hospital/place/objects"), Buckets()
    filesystem.made = []
    store.__dict__["_place"] = filesystem, "hospital/place/objects"
    with pytest.raises(StorageError, match=r"^s3://hospital/place/objects: there is no bucket or container 'hospital'; create it"):
        store.put("a", FILES)
    assert filesystem.made == []
    filesystem.made = ["hospital"]
    assert store.put("a", FILES)
    assert filesystem.made == ["hospital"]


def test_faults_of_any_kind_name_the_place_and_no_password(monkeypatch):
    store = UrlStore("memory://ann:secret@host/place")
    monkeypatch.setattr(type(store._place[0]), "find", lambda *_: (_ for _ in ()).throw(LookupError("no credentials\nof a trace")))
    with pytest.raises(StorageError, match=r"^memory://ann:\*\*\*@host/place/: LookupError: no credentials; check the URL"):
        store.names()
