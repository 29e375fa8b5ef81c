"""Lock, events, status, display and store: the parts of a run that people and other processes meet."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console

from fedpeft import config
from fedpeft.errors import ConfigError, LinkError, StorageError
from fedpeft.files import write_atomic
from fedpeft.parity.federating import history
from fedpeft_coordinator import display, lock
from fedpeft_coordinator.admission import key_files
from fedpeft_coordinator.collecting import line
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.events import Events, read_events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.status import status
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.supervise import check_port
from fedpeft_coordinator.up import greeting, summary


def test_two_coordinators_cannot_share_a_state(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        assert lock.holder(tmp_path) == os.getpid()
        with pytest.raises(StorageError, match=f"process {os.getpid()} runs a coordinator on it"), lock.held(tmp_path):
            pass
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path):
        pass


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Events(path)("round", round=1)
    with path.open("a") as file:
        file.write('{"event": "rou')
    assert [row["event"] for row in read_events(path)] == ["round"]


def test_status_of_a_run(fake: ModuleType, tmp_path: Path) -> None:
    tasks = {name: {"kind": "classification", "labels": ["a", "b"]} for name in fake.TASKS}
    federation_config = config.parse({"name": "fake", "state": str(tmp_path), "tasks": tasks}, FederationConfig, "f.toml")
    with pytest.raises(StorageError, match="nothing ran here yet"):
        status(federation_config)
    assert greeting(federation_config).endswith("(no TLS, any site); 1 site must join before the first round")
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    federation.sites["south"].twist = lambda result, _arrays: setattr(result, "weight", 9.0) if result.weight else None
    coordinator = federation.open()
    coordinator.step()
    assert greeting(federation_config).endswith("it goes on with round 1 of 10")
    coordinator.events.path = tmp_path / "events.jsonl"
    coordinator.run()
    found = status(federation_config)
    assert (found["round"], found["step"], found["running"]) == (4, "published", None)
    assert greeting(federation_config).endswith("it goes on with round 5 of 10")
    assert found["tasks"]["area"]["updated"] == 4
    assert found["tasks"]["area"]["scores"]["accuracy"] > 0
    assert found["tasks"]["thing"]["version"] is None
    assert found["sites"]["south"]["drop_outs"][-1]["round"] == 4
    assert "weight 9.0" in found["sites"]["south"]["drop_outs"][-1]["reason"]
    assert found["sites"]["north"]["bytes_up"] > 0
    table = history(list(read_events(tmp_path / "events.jsonl")))
    assert [(row["round"], row["task"]) for row in table] == [(number, task) for number in range(1, 5) for task in fake.TASKS]
    assert sum(row["bytes_up"] for row in table if row["task"] == "area") == sum(site["bytes_up"] for site in found["sites"].values())
    assert [row["loss"] for row in table[:3]] == [1.25, 1.25, None]
    assert table[-3]["scores"] == found["tasks"]["area"]["scores"]
    out = io.StringIO()
    summary(found, Console(file=out, width=200))
    assert "area" in out.getvalue()
    out = io.StringIO()
    summary(found, Console(file=out, width=80))
    assert all(name in out.getvalue() for name in ("north", "south"))
    assert "last drop-out of south: " in out.getvalue()
    assert "weight 9.0" in out.getvalue()
    assert "untouched" not in out.getvalue()
    assert "fake: round 4 of 10, published; no coordinator runs on it now: `fedpeft coordinator up` goes on" in out.getvalue()


def test_plain_lines_when_nobody_watches(fake: ModuleType, tmp_path: Path) -> None:
    out = io.StringIO()
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    federation.sites["west"].twist = lambda result, _arrays: setattr(result, "weight", 9.0) if result.weight else None
    with display.shown(4, Console(file=out, width=300)) as listen:
        coordinator = federation.open()
        coordinator.events.listeners.append(listen)
        coordinator.run()
    text = out.getvalue()
    assert "site north is here" in text
    assert "round 1: west dropped out of area: bad update: update: weight 9.0" in text
    assert "round 4/4: area A loss 1.2500 from 2 of 3 site(s)" in text
    assert "thing untouched (0 site(s) hold it, cohort.min_sites = 1)" in text
    assert "published area" in text
    assert "round 4 scores: area accuracy" in text


def test_what_averaging_loses_is_shown_and_warned_about(fake: ModuleType, tmp_path: Path) -> None:
    out, tasks = io.StringIO(), {"area": {"kind": "classification", "labels": ["a", "b"]}}
    federation_config = config.parse({"name": "fake", "state": str(tmp_path), "tasks": tasks}, FederationConfig, "f.toml")
    federation = fake.Federation(tmp_path, fake.setup(3, {"kind": "fedavg", "probes": 4}, "sgd", ("area",), reach=16.0), fake.sites())
    for site in federation.sites.values():
        site.pull = 1.0
    with display.shown(3, Console(file=out, width=300)) as listen:
        coordinator = federation.open()
        coordinator.events.listeners.append(listen)
        rounds = coordinator.run()
    rho = rounds[-1].tasks["area"].drift["drift"]
    assert f"averaging lost more than half of the update of task area in round 3 (rho {rho:.2f})" in out.getvalue()
    found = status(federation_config)
    assert found["tasks"]["area"]["drift"] == {"drift": rho}
    summary(found, Console(file=out, width=200))
    assert f"{rho:.3f}" in out.getvalue()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match=f"link 127.0.0.1:{port}: Address already in use"):
            check_port("127.0.0.1", port)


def test_no_keys_is_a_config_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no NAME\.pub"):
        key_files(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        write_atomic(tmp_path / "x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_arrays_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put_arrays({"B.m": np.arange(3, dtype=np.float32), "A.v": np.zeros(0, np.float32)})
    assert store.arrays(digest)["B.m"].tolist() == [0, 1, 2]
    with pytest.raises(StorageError, match="is missing"):
        store.arrays("0" * 64)


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    for url in ("nonsense:secret", f"sqlite:///{tmp_path}/file/x/journal.sqlite", "postgresql+nodriver://ann:secret@localhost/x"):
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(StorageError, match="journal") as fault:
            Journal(url)
        assert "secret" not in str(fault.value)


def test_what_a_site_writes_cannot_garble_a_screen() -> None:
    assert line("a\n\x1b[31mb\t" + "x" * 1000) == "a ?[31mb " + "x" * 291
