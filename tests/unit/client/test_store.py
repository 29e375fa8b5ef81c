"""The site's files: whole or absent, bounded, never outside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic
from fedpeft_client import audit
from fedpeft_client.store import Store, scratch, sweep


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@given(blob=st.binary(max_size=4096))
def test_what_is_put_comes_back(tmp_path_factory: pytest.TempPathFactory, blob: bytes) -> None:
    store = Store(tmp_path_factory.mktemp("store"), keep=2)
    store.put(key(0), blob)
    assert store.get(key(0)) == blob
    assert key(0) in store
    assert key(1) not in store
    assert store.get(key(1)) is None


def test_only_the_youngest_are_kept_and_reading_rejuvenates(tmp_path: Path) -> None:
    store = Store(tmp_path / "blobs", keep=3)
    for number in range(3):
        store.put(key(number), b"x")
    assert store.get(key(0)) == b"x"
    store.put(key(3), b"x")
    assert [number for number in range(4) if key(number) in store] == [0, 2, 3]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda _: b""])
def test_a_torn_blob_counts_as_absent(tmp_path: Path, damage) -> None:
    store = Store(tmp_path, keep=3)
    store.put(key(0), b"precious")
    (tmp_path / key(0)).write_bytes(damage((tmp_path / key(0)).read_bytes()))
    assert store.get(key(0)) is None
    assert key(0) not in store


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "", "A" * 64, "0" * 63])
def test_a_key_from_outside_cannot_name_another_file(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, keep=3)
    with pytest.raises(StorageError, match="not a SHA-256"):
        store.put(name, b"x")
    with pytest.raises(StorageError, match="not a SHA-256"):
        store.get(name)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "held.json"
    write_atomic(path, b"old")
    code = (
        "import resource, sys; from pathlib import Path; from fedpeft.files import write_atomic; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_atomic(Path(sys.argv[1]), bytes(2000))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "StorageError" in done.stderr
    assert "File too large" in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_what_a_killed_writer_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    for name, age in ((".new-old", 7200), (".new-young", 10), ("kept", 7200)):
        path = tmp_path / "answers" / name
        path.write_text("x")
        os.utime(path, (time.time() - age,) * 2)
    sweep(tmp_path)
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == [".new-young", "kept"]


def test_scratch_folders_are_bounded(tmp_path: Path) -> None:
    for number in range(5):
        (scratch(tmp_path, key(number), keep=2) / "file").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {key(2), key(3), key(4)}


def test_the_audit_log_has_a_line_per_departure_and_turns_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "state" / "audit.jsonl"
    left = audit.Departure("clinic", 3, "train", "triage", "ok", {"B": 1024}, ("train.loss",), 0.5, "ab" * 32)
    audit.record(log, left)
    audit.record(log, left)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["task"] == "triage"
    assert lines[0]["tensors"] == {"B": 1024}
    monkeypatch.setattr(audit, "LIMIT_BYTES", 10)
    audit.record(log, left)
    assert len(log.read_text().splitlines()) == 1
    assert len(log.with_suffix(".jsonl.1").read_text().splitlines()) == 2


def test_an_audit_log_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="audit log"):
        audit.record(tmp_path / "state" / "audit.jsonl", audit.Departure("f", 1, "train", "t", "ok"))


def test_other_users_of_the_machine_read_nothing(tmp_path):
    Store(tmp_path / "answers", 2).put("a" * 64, b"an update in the clear")
    assert (tmp_path / "answers" / ("a" * 64)).stat().st_mode & 0o077 == 0
    assert scratch(tmp_path / "checkpoints", "b" * 64, 2).stat().st_mode & 0o077 == 0
