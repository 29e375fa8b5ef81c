"""Registries, manifests, signatures and adapter folders from elsewhere: named faults only, nothing large is allocated."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, AdapterSpec, load
from fedpeft.adapters.folder import SPEC, TENSORS, contents
from fedpeft.bases import HeadSpec
from fedpeft.errors import AdapterError, FedpeftError, StorageError
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry, log
from fedpeft.routing import Card
from fedpeft.signing import Keys, verified
from fedpeft.tensors import Entry, Layout, Tensors

LAYOUT = Layout.of([Entry("A", "x.lora_A.weight", (2, 6)), Entry("B", "x.lora_B.weight", (6, 2))])
SPECIMEN = AdapterSpec("mail", "ab" * 32, "tiny", METHODS["lora"](r=2), HeadSpec("lm"), LAYOUT)  # type: ignore[call-arg]
DEEP = ("[" * 100_000).encode()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    adapter = Adapter(SPECIMEN, Tensors(LAYOUT, np.arange(LAYOUT.size, dtype=np.float32)))
    return contents(adapter)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@given(data=st.data())
def test_an_adapter_folder_with_a_garbled_spec(files, data, tables, bounded, tmp_path_factory):
    table = data.draw(tables(json.loads(files[SPEC])))
    folder = write(tmp_path_factory.getbasetemp() / "spec", {**files, SPEC: json.dumps(table).encode()})
    with bounded(20_000_000), contextlib.suppress(AdapterError, StorageError):
        load(folder)


@given(data=st.data())
def test_an_adapter_folder_with_spoilt_tensors(files, data, spoilt, bounded, tmp_path_factory):
    folder = write(tmp_path_factory.getbasetemp() / "tensors", {**files, TENSORS: data.draw(spoilt(files[TENSORS]))})
    with bounded(20_000_000), contextlib.suppress(AdapterError, StorageError):
        load(folder)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F64", "I64", "F8_E4M3", "BOOL"])
def test_tensors_of_other_types_are_named(files, tmp_path, kind):
    width = {"F64": 8, "I64": 8, "BF16": 2, "F16": 2}.get(kind, 1)
    head = json.dumps({"x.lora_A.weight": {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * width]}}).encode()
    folder = write(tmp_path / "a", {**files, TENSORS: len(head).to_bytes(8, "little") + head + bytes(2 * width)})
    with pytest.raises((AdapterError, StorageError)):
        load(folder)


def test_a_spec_that_claims_any_size_allocates_nothing(files, tmp_path, bounded):
    table = json.loads(files[SPEC])
    table["spec"]["layout"][0]["shape"] = [2**40, 2**40]
    folder = write(tmp_path / "a", {**files, SPEC: json.dumps(table).encode()})
    with bounded(20_000_000), pytest.raises(AdapterError):
        load(folder)


MANIFEST = Manifest(task="mail", metrics={"accuracy": 0.5}, files={"a": "b"}, parents=("c",), card={"centroid": [1.0]})


@given(data=st.data())
def test_a_garbled_manifest_is_a_storage_error(data, tables):
    table = data.draw(tables(json.loads(MANIFEST.to_bytes())))
    with contextlib.suppress(StorageError):
        found = Manifest.from_bytes(json.dumps(table).encode())
        assert isinstance(found.files, dict)
        assert all(isinstance(name, str) and "/" not in name for name in found.files)


@pytest.mark.parametrize("data", [b"", b"\xff", DEEP, b"9" * 5000, b"NaN", b"[]", b'{"format": 1}'], ids=range(7))
def test_hostile_manifests_are_storage_errors(data):
    with pytest.raises(StorageError):
        Manifest.from_bytes(data)


def test_a_manifest_names_no_file_outside_its_folder():
    table = {**json.loads(MANIFEST.to_bytes()), "files": {"../../etc/passwd": "0" * 64}}
    with pytest.raises(StorageError, match="files"):
        Manifest.from_bytes(json.dumps(table).encode())


ENTRY = {"number": 1, "action": "publish", "digest": "a" * 64, "origin": "o", "created": "t", "previous": log.START}


def line(table: Any) -> bytes:
    with contextlib.suppress(TypeError, AttributeError):
        table = {**table, "hash": log.Entry(**table).hash}
    return json.dumps(table).encode()


@given(data=st.data())
def test_a_garbled_history_is_a_storage_error(data, tables):
    with contextlib.suppress(StorageError):
        for entry in log.parse([line(data.draw(tables(ENTRY)))], "log"):
            assert len(entry.digest) == 64
            assert "/" not in entry.digest


@pytest.mark.parametrize("data", [DEEP, b"9" * 5000, b"\xff\xfe", b'{"hash": 1}', b"null"], ids=range(5))
def test_hostile_histories_are_storage_errors(data):
    with pytest.raises(StorageError, match="line 1"):
        log.parse([data], "log")


def test_a_history_points_at_no_folder_outside(tmp_path):
    place = tmp_path / "refs" / "mail"
    place.mkdir(parents=True)
    (place / "log").write_bytes(line({**ENTRY, "digest": "../../../../etc"}) + b"\n")
    with pytest.raises(StorageError):
        Registry(tmp_path).get("mail")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), "fuzz")


@given(data=st.data())
def test_spoilt_signatures_never_hold_and_never_crash(keys, data, tables, spoilt):
    good = keys.sign(b"data")
    bad = data.draw(st.one_of(spoilt(good), tables(json.loads(good)).map(lambda table: json.dumps(table).encode()), st.binary(max_size=99)))
    if json_or_none(bad) != json.loads(good):
        assert keys.fault(b"data", bad) is not None
        assert not verified(b"data", bad, keys.public(), "fuzz")
        with contextlib.suppress(StorageError):
            Keys.signer(bad)


def json_or_none(data: bytes) -> Any:
    try:
        table = json.loads(data)
        return {key: str(value).strip().lower() for key, value in table.items() if key in ("key", "signature")}
    except (ValueError, AttributeError):
        return None


@pytest.mark.parametrize("bad", [DEEP, b'{"key": "', b'{"key": [], "signature": {}}', b"9" * 5000, b"[]"], ids=range(5))
def test_hostile_signatures_never_crash(keys, bad):
    assert keys.fault(b"data", bad) is not None
    assert not verified(b"data", bad, keys.public(), "fuzz")
    with pytest.raises(StorageError):
        Keys.signer(bad)


@given(data=st.data())
def test_a_garbled_router_card_is_an_adapter_error(data, tables):
    with contextlib.suppress(AdapterError):
        Card.from_json(data.draw(tables({"centroid": [0.6, 0.8], "threshold": 0.5, "count": 3})))


def test_the_specimen_itself_is_read(files, tmp_path):
    assert load(write(tmp_path / "a", files)).spec == SPECIMEN
    with pytest.raises(FedpeftError):
        load(tmp_path / "b")
