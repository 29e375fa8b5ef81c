"""A coordinator without torch: another process looks at the base; its faults are ours; what it said counts while it would say so again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import AdapterError, BaseError
from fedpeft_coordinator import apart, remembered


class Asked:
    """A process that loaded the file ``source``, and how often it was asked."""

    def __init__(self, source: Path) -> None:
        self.source, self.times = source, 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return {"layouts": self.times, remembered.SOURCES: [str(self.source)]}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "module.py").write_text("A = 1")
    return Asked(tmp_path / "module.py")


def test_an_answer_is_given_again_for_the_same_matter_alone(asked: Asked) -> None:
    assert [remembered.answer({"r": r}, asked)["layouts"] for r in (4, 4, 8, 4)] == [1, 1, 2, 1]


def _edit(source: Path) -> None:
    source.write_text("A = 2 ")


def _touch(source: Path) -> None:
    os.utime(source, ns=(1, 1))


@pytest.mark.parametrize("change", [_edit, _touch, Path.unlink])
def test_a_changed_source_file_is_asked_anew(asked: Asked, change: Any) -> None:
    remembered.answer({}, asked)
    content = asked.source.read_text()
    change(asked.source)
    if not asked.source.exists():
        asked.source = asked.source.with_name("moved.py")
        asked.source.write_text(content)
    assert [remembered.answer({}, asked)["layouts"] for _ in range(2)] == [2, 2]


def test_another_package_is_asked_anew(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    (tmp_path / "site" / "torch-1.0.dist-info").mkdir(parents=True)
    remembered.answer({}, asked)
    (tmp_path / "site" / "torch-1.0.dist-info").rename(tmp_path / "site" / "torch-1.1.dist-info")
    assert remembered.answer({}, asked)["layouts"] == 2


@pytest.mark.parametrize("torn", ["", "[]", "{}", '{"state": 1, "sources": 3, "answer": {}}', "\x00"])
def test_what_cannot_be_read_or_written_is_asked_anew(asked: Asked, tmp_path: Path, torn: str) -> None:
    remembered.answer({}, asked)
    (kept,) = (tmp_path / "cache" / "layouts").iterdir()
    kept.write_text(torn)
    assert remembered.answer({}, asked)["layouts"] == 2
    assert remembered.answer({}, asked)["layouts"] == 2
    kept.unlink()
    kept.mkdir()
    assert remembered.answer({}, asked)["layouts"] == 3


def test_a_user_without_a_home_is_served_too(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPEFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("~unknown").expanduser())
    assert [remembered.answer({}, asked) for _ in range(2)] == [{"layouts": 1}, {"layouts": 2}]


def test_the_fewest_answers_stay(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 3)
    for number in range(5):
        remembered.answer({"number": number}, asked)
    assert len(list((tmp_path / "cache" / "layouts").iterdir())) == 3


def test_what_a_process_apart_meets_is_a_fault_of_ours_or_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    monkeypatch.setattr(sys, "executable", str(child))
    for script, kind, words in (
        ('printf "the method fits nothing" > "$6"; echo chatter >&2; exit 6', AdapterError, "^the method fits nothing$"),
        ("echo killed on the way >&2; exit 6", RuntimeError, "code 6:\nkilled on the way"),
        ("kill -9 $$", BaseError, "signal 9"),
        ("echo KeyError: 3 >&2; exit 1", RuntimeError, "code 1:\nKeyError: 3"),
    ):
        child.write_text(f"#!/bin/sh\n{script}\n")
        child.chmod(0o700)
        with pytest.raises(kind, match=words):
            apart.answer("lay", {})
    child.write_text('#!/bin/sh\ncat "$5" > "$6"\n')
    assert apart.answer("lay", {"a": 1}) == {"a": 1}
