from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedpeft.adapters import Adapter, load, make_spec, save
from fedpeft.bases import Base, HeadSpec
from fedpeft.errors import AdapterError, FedpeftError, StorageError
from fedpeft.methods.protocol import Method
from fedpeft.tensors import Tensors

Warm = Callable[..., Base]
Shaken = Callable[..., Adapter]
LABELS = HeadSpec("classification", ("a", "b", "c"))
TENSORS, SPEC, CONFIG = "adapter_model.safetensors", "fedpeft.json", "adapter_config.json"


@pytest.fixture
def adapter(warm: Warm, lora: Method, shaken: Shaken) -> Adapter:
    return shaken(make_spec("mail", warm("encoder"), lora, LABELS))


def test_what_is_saved_is_what_is_loaded(warm: Warm, method: Method, shaken: Shaken, tmp_path: Path) -> None:
    want = shaken(make_spec("mail", warm("encoder"), method, LABELS))
    save(want, tmp_path / "deep" / "a", {"round": 3})
    found = load(tmp_path / "deep" / "a")
    assert found.spec == want.spec
    assert found.tensors.flat.tobytes() == want.tensors.flat.tobytes()
    assert json.loads((tmp_path / "deep" / "a" / SPEC).read_text())["extra"] == {"round": 3}
    assert sorted(path.name for path in (tmp_path / "deep" / "a").iterdir()) == [CONFIG, TENSORS, SPEC]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]


def test_equal_adapters_give_equal_bytes(adapter: Adapter, tmp_path: Path) -> None:
    save(adapter, tmp_path / "a")
    save(Adapter(adapter.spec, Tensors(adapter.spec.layout, adapter.tensors.flat.copy())), tmp_path / "b")
    for name in (CONFIG, TENSORS, SPEC):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def edit(path: Path, work: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    work(table)
    path.write_text(json.dumps(table))


def respell(folder: Path, work: Callable[[dict[str, Any]], object]) -> None:
    named = load_file(folder / TENSORS)
    work(named)
    save_file(named, folder / TENSORS)


def first(named: dict[str, Any]) -> str:
    return sorted(named)[0]


@pytest.mark.parametrize(
    ("spoil", "fault", "says"),
    [
        (lambda f: (f / SPEC).unlink(), StorageError, "no such file"),
        (lambda f: (f / TENSORS).unlink(), StorageError, "no such file"),
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-7]), StorageError, "torn"),
        (lambda f: (f / TENSORS).write_bytes(b""), StorageError, "torn"),
        (lambda f: (f / TENSORS).write_bytes(b"\xff" * 64), StorageError, "torn"),
        (lambda f: (f / TENSORS).write_bytes(b"\x80\x04\x95cos\nsystem\n"), StorageError, "torn"),
        (lambda f: (f / SPEC).write_text((f / SPEC).read_text()[:50]), StorageError, "torn or not JSON"),
        (lambda f: (f / SPEC).write_text("[]"), AdapterError, "not of format"),
        (lambda f: (f / SPEC).write_bytes(b"\xff\xfe"), StorageError, "torn or not JSON"),
        (lambda f: edit(f / SPEC, lambda t: t.update(format=99)), AdapterError, "not of format 1"),
        (lambda f: edit(f / SPEC, lambda t: t["spec"]["method"].update(kind="magic")), AdapterError, "unknown kind 'magic'"),
        (lambda f: edit(f / SPEC, lambda t: t["spec"].update(task="other")), StorageError, "do not match the digest"),
        (lambda f: respell(f, lambda n: n.pop(first(n))), AdapterError, "missing"),
        (lambda f: respell(f, lambda n: n.update(extra=np.zeros(1, np.float32))), AdapterError, "unexpected"),
        (lambda f: respell(f, lambda n: n.update({first(n): n[first(n)].reshape(-1)})), AdapterError, "shapes of"),
        (lambda f: edit(f / SPEC, lambda t: t["spec"]["layout"][0].update(shape=[10**15])), AdapterError, "shapes of"),
        (lambda f: (f / SPEC).write_text("[" * 100_000), StorageError, "torn or not JSON"),
        (lambda f: respell(f, lambda n: n.update({first(n): n[first(n)].astype(np.float16)})), AdapterError, "not float32"),
        (lambda f: respell(f, lambda n: n[first(n)].__setitem__(..., 7)), StorageError, "do not match the digest"),
    ],
)
def test_a_spoiled_folder_is_refused_in_one_line(
    adapter: Adapter, tmp_path: Path, spoil: Callable[[Path], object], fault: type[FedpeftError], says: str
) -> None:
    save(adapter, tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(fault, match=says) as caught:
        load(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_full_disk_leaves_nothing_behind(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    targets = {"fsync": "os.fsync", "rename": "pathlib.Path.rename", "open": "fedpeft.adapters.folder.open"}
    monkeypatch.setattr(targets[call], full, raising=False)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        save(adapter, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(adapter: Adapter, tmp_path: Path) -> None:
    save(adapter, tmp_path / "a")
    with pytest.raises(StorageError, match="exists already"):
        save(adapter, tmp_path / "a")
    assert load(tmp_path / "a").digest == adapter.digest


def test_a_place_that_cannot_be_written(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save(adapter, tmp_path / "file" / "a")


def test_values_that_are_not_finite_are_not_saved(adapter: Adapter, tmp_path: Path) -> None:
    adapter.tensors.flat[3] = np.nan
    with pytest.raises(AdapterError, match="NaN"):
        save(adapter, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
