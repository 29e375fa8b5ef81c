from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.bases import BaseSpec, fingerprint
from fedpeft.errors import BaseError

Tiny = Callable[[str], Path]


@pytest.fixture
def folder(tiny_model: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("bert"), tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**table, **changes}))


def test_a_copy_has_the_same_fingerprint(tiny_model: Tiny, folder: Path) -> None:
    assert fingerprint(BaseSpec(str(folder))) == fingerprint(BaseSpec(str(tiny_model("bert"))))


def test_origin_and_version_notes_do_not_count(folder: Path) -> None:
    before = fingerprint(BaseSpec(str(folder)))
    edit(folder / "config.json", _name_or_path="elsewhere", transformers_version="4.0.0")
    (folder / "README.md").write_text("a card")
    assert fingerprint(BaseSpec(str(folder))) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda f: edit(f / "config.json", num_attention_heads=2), "weights"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1] + b"\x01"), "weights"),
        (lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"), "weights"),
        (lambda f: edit(f / "tokenizer_config.json", model_max_length=7), "tokenizer"),
        (lambda f: edit(f / "tokenizer.json", added=1), "tokenizer"),
        (lambda f: edit(f / "tokenizer_config.json", chat_template="{{ messages }}"), "template"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "template"),
    ],
)
def test_every_part_is_seen_and_seen_apart(folder: Path, change: Callable[[Path], object], part: str) -> None:
    before = fingerprint(BaseSpec(str(folder)))
    change(folder)
    after = fingerprint(BaseSpec(str(folder)))
    assert [name for name in ("weights", "tokenizer", "template") if getattr(before, name) != getattr(after, name)] == [part]
    assert before.identity != after.identity


def test_quantization_is_kept_apart(folder: Path) -> None:
    plain, small = fingerprint(BaseSpec(str(folder))), fingerprint(BaseSpec(str(folder), "nf4"))
    assert (plain.identity, small.quantization) == (small.identity, "nf4")


def test_files_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(BaseSpec(str(folder)))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(BaseSpec(str(folder))) == first


def test_a_changed_file_of_equal_size_is_hashed_again(folder: Path) -> None:
    before = fingerprint(BaseSpec(str(folder)))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(1, 1))
    assert fingerprint(BaseSpec(str(folder))).weights != before.weights


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{torn"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights"),
        (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_in_one_line(folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(folder)
    with pytest.raises(BaseError, match=says) as caught:
        fingerprint(BaseSpec(str(folder)))
    assert "\n" not in str(caught.value)
