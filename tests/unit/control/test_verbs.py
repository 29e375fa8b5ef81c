"""The command line against a control plane: each fault is one line that says what to do, with the exit code of its kind."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import islice

import pytest

from fedpeft.cli.main import run
from fedpeft.control.changes import follow
from fedpeft.control.link import Link
from fedpeft.errors import AdapterError, BaseError, ConfigError, LinkError, PolicyError
from fedpeft.registry import Manifest, Registry
from fedpeft_coordinator.control.federation import message
from fedpeft_coordinator.control.watching import described

pytestmark = pytest.mark.integration


@pytest.fixture
def said(secure, certificates, capsys, monkeypatch, tmp_path):
    """``said("adapters show area", code, who)``: what the verb printed, with the identity ``who`` of ``certificates``."""
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEDPEFT_REGISTRY", f"grpc://127.0.0.1:{secure.port}")

    def go(verb: str, code: int = 0, who: str | None = "ours/operator-root.pem") -> str:
        monkeypatch.setenv("FEDPEFT_IDENTITY", "" if who is None else str(certificates / who))
        assert run(verb.split()) == code
        seen = capsys.readouterr()
        if code:
            assert len(seen.err.splitlines()) == 1, seen.err
            assert seen.err.startswith("fedpeft: ")
        return seen.err or seen.out

    return go


CASES = [
    ("adapters show verb", None, AdapterError, "task 'verb' has no version"),
    ("adapters list", "other/operator-eve.pem", LinkError, "its certificate does not hold"),
    ("adapters list", "ours/none.pem", ConfigError, "do not exist; `fedpeft certificates` writes"),
    ("adapters list", "", LinkError, "uses TLS and was called without; give --identity"),
    ("adapters rollback area 1", "ours/reader-ann.pem", PolicyError, "role 'reader' (ann) may not call fedpeft.v1.Registry/Rollback"),
    ("coordinator status {url}", "ours/site-clinic.pem", PolicyError, "may not call fedpeft.v1.Federation/Status"),
    ("coordinator status {url}", None, LinkError, "this server serves a registry alone"),
    ("route hello --router there", None, LinkError, "this server reads no texts"),
    ("route hello --router there --task verb", None, AdapterError, "task 'verb'"),
    ("route hello --registry {folder} --router there", None, ConfigError, "is a folder; give grpc://"),
    ("coordinator serve {folder} --set port", None, ConfigError, "--set port: needs the form key=value, for example port=8001"),
    ("evaluate {folder}/absent.jsonl", None, 4, "absent.jsonl"),
    ("route hello --registry grpc://127.0.0.1:9", None, LinkError, "cannot be reached"),
]


@pytest.mark.parametrize(("verb", "who", "kind", "words"), CASES, ids=[words for *_, words in CASES])
def test_a_fault_is_one_line_with_its_exit_code(said, secure, tmp_path, verb, who, kind, words):
    shown = "ours/operator-root.pem" if who is None else who or None
    code = kind if isinstance(kind, int) else kind.exit_code
    assert words in said(verb.format(url=f"grpc://127.0.0.1:{secure.port}", folder=tmp_path), code, shown)


def test_a_wrong_base_a_deadline_and_a_task_by_name(said, secure, made, tmp_path, monkeypatch):
    url, mine, found = f"grpc://127.0.0.1:{secure.port}", Registry(tmp_path / "mine"), made.adapter(8)
    mine.publish(replace(found, spec=replace(found.spec, base="e" * 64)), Manifest(), "foreign")
    secure.registry.objects.keys.trust(mine.objects.keys.public())
    words = said(f"adapters push area --to {url} --registry {mine.root}", BaseError.exit_code, "ours/publisher-trainer.pem")
    assert "was trained on base eeeeeeeeeeee" in words
    assert len(secure.registry.list()) == 2
    told = json.loads(said("route anything --router there --task area --json"))
    assert (told["task"], told["weights"], told["router"]) == ("area", {"area": 1.0}, "task")
    real = Registry.get
    monkeypatch.setattr(Link.unary, "__defaults__", (0.3,))
    monkeypatch.setattr(Registry, "get", lambda *given: (time.sleep(1), real(*given))[1])
    assert "did not answer in time" in said("adapters show area", LinkError.exit_code)


def test_changes_of_a_folder_are_those_of_its_server(tmp_path, made):
    registry = Registry(tmp_path / "registry")
    made.fill(registry, 1, 2)
    made.fill(registry, 3, task="verb")
    changes = follow(registry, ("area",), from_start=True)
    assert [change.version.number for change in islice(changes, 2)] == [1, 2]
    registry.alias("area", "prod", "1")
    registry.rollback("verb", "1")
    moved = next(changes)
    assert (moved.alias.alias, moved.seen.events, moved.seen.moves) == ("prod", 2, 1)


def test_a_status_means_the_same_after_its_way():
    task = {"adapter": "a", "updated": 2, "skipped": 1, "loss": 0.5, "scores": {"accuracy": 0.75}, "version": "b", "last_reason": "r"}
    spent = {"protects": "example", "spent": 1.5, "left": 0.5, "budget": 2.0, "delta": 1e-5, "sites": {"north": 1.5}}
    site = {"state": "ok", "refused": "", "device": "cpu", "quantization": "nf4", "base_loads": 1, "bytes_up": 5, "bytes_down": 7}
    times = {"seconds_training": None, "seconds_answer": 1.5, "last_drop_out": "round 1, area: slow", "tasks": {"area": 9}}
    found = {
        "federation": "f",
        "running": True,
        "rounds": 3,
        "round": 2,
        "step": "collecting",
        "base": "c",
        "masked": True,
        "tasks": {
            "area": {**task, "drift": {"drift": 0.25}, "epsilon": spent},
            "verb": {**task, "loss": None, "drift": {}, "epsilon": None},
        },
        "sites": {"north": {**site, **times}},
        "registry": "here",
    }
    assert described(message(found), "here") == found
