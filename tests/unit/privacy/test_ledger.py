"""The ledger: nothing is released unwritten, nothing written is lost, changed or forgotten, no budget is exceeded."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.cli.main import run
from fedpeft.errors import ConfigError, PrivacyError, StorageError
from fedpeft.privacy import ledger as module
from fedpeft.privacy.accounting import Event, epsilon
from fedpeft.privacy.ledger import Budget, Charge, Ledger

LARGE = Budget(1e6, 1e-5)
ADAPTER, METRICS = Event(4.0, concentrated=True), Event(16.0, concentrated=True)


def charge(round: int, task: str = "area", kind: str = "adapter", event: Event = ADAPTER, **more) -> Charge:
    return Charge(f"run/{round}/0/{task}/{kind}", task, kind, event, **more)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "state" / "ledger")


def test_totals_are_the_accountants_over_all_kinds(ledger):
    for round in range(3):
        ledger.spend(charge(round), LARGE)
        after = ledger.spend(charge(round, kind="metrics", event=METRICS), LARGE)
    ledger.spend(charge(0, "other"), LARGE)
    assert after == epsilon([ADAPTER.times(3), METRICS.times(3)], 1e-5)
    assert ledger.spent(1e-5, "area") == after
    assert ledger.spent(1e-5, "other") == epsilon([ADAPTER], 1e-5)
    assert ledger.spent(1e-5) == epsilon([ADAPTER.times(4), METRICS.times(3)], 1e-5)
    assert Ledger(ledger.folder).spent(1e-5, "area") == after
    assert ledger.verify() == []


@pytest.mark.parametrize("kind", module.KINDS)
def test_centroids_gates_and_metrics_cost_as_adapters_do(ledger, kind):
    assert ledger.spend(charge(1, kind=kind), LARGE) == epsilon([ADAPTER], 1e-5)


def test_a_site_pays_for_every_task_it_was_in(ledger):
    ledger.spend(charge(1, "area", sites=("a", "b")), LARGE)
    ledger.spend(charge(1, "risk", sites=("b", "c")), LARGE)
    ledger.spend(charge(2, "all"), LARGE)
    assert ledger.spent(1e-5, site="b") == epsilon([ADAPTER.times(3)], 1e-5)
    assert ledger.spent(1e-5, site="a") == epsilon([ADAPTER.times(2)], 1e-5)
    limit = Budget(epsilon([ADAPTER.times(3)], 1e-5) + 1e-9, 1e-5)
    assert ledger.require(charge(3, "new", sites=("a",)), limit, site="a") <= limit.epsilon
    with pytest.raises(PrivacyError, match="site 'b'"):
        ledger.require(charge(3, "new", sites=("b",)), limit, site="b")


def test_examples_and_sites_are_never_added_up(ledger):
    steps = Event(1.0, 0.01, 100)
    ledger.spend(charge(1), LARGE)
    assert ledger.spend(charge(2, event=steps, unit="example"), LARGE) == epsilon([steps], 1e-5)
    assert ledger.spent(1e-5, unit="site") == epsilon([ADAPTER], 1e-5)


def test_what_would_exceed_is_refused_and_not_written(ledger):
    limit = Budget(epsilon([ADAPTER.times(2)], 1e-5), 1e-5)
    for round in (1, 2):
        ledger.spend(charge(round), limit)
    before = ledger.path.read_bytes()
    with pytest.raises(PrivacyError, match=r"task 'area' has spent epsilon .* of .*; the round is refused"):
        ledger.spend(charge(3), limit)
    with pytest.raises(PrivacyError, match="refused"):
        Ledger(ledger.folder).require(charge(3), limit)
    assert ledger.path.read_bytes() == before
    ledger.spend(charge(3, "other"), limit)


@pytest.mark.parametrize("budget", [Budget(float("nan"), 1e-5), Budget(0.0, 1e-5), Budget(-1.0, 1e-5)])
def test_no_budget_allows_nothing(ledger, budget):
    with pytest.raises(PrivacyError, match="refused"):
        ledger.spend(charge(1), budget)


def test_the_same_release_is_written_once_and_its_id_serves_nothing_else(ledger):
    limit = Budget(epsilon([ADAPTER], 1e-5), 1e-5)
    first = ledger.spend(charge(1), limit)
    assert ledger.spend(charge(1), limit) == first == ledger.require(charge(1), limit)
    assert len(ledger.entries()) == 1
    for other in (charge(1, event=Event(5.0)), charge(1, sites=("a",))):
        with pytest.raises(PrivacyError, match="another release"):
            ledger.spend(other, LARGE)


def test_writers_take_turns(ledger):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda round: Ledger(ledger.folder).spend(charge(round), LARGE), range(24)))
    assert len(ledger.entries()) == 24
    assert ledger.verify() == []


# crashes


def test_kill_nine_never_loses_what_was_released(ledger, forked):
    chance, released = random.Random(5), 0

    def spend(first, say):
        for round in itertools.count(first):
            event = Event(4.0, concentrated=True)
            Ledger(ledger.folder).spend(Charge(f"run/{round}", "area", "adapter", event), Budget(1e6, 1e-5))
            say(round)

    for _ in range(4):
        worker = forked(lambda say: spend(released, say))  # noqa: B023 - used within the iteration
        assert worker.said.readline()
        time.sleep(chance.uniform(0.0, 0.1))
        lines, code = worker.end(kill=True)
        assert code == -9
        released = max([released + 1, *(int(line) + 1 for line in lines)])
        found = {entry.charge.id for entry in ledger.entries()}
        assert {f"run/{round}" for round in range(released)} <= found
        assert len(found) <= released + 1
        assert ledger.verify() == []
    assert released > 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6))
def test_a_torn_last_line_never_happened_and_is_cut_off(tmp_path, cut):
    ledger = Ledger(tmp_path / str(cut))
    for round in range(2):
        ledger.spend(charge(round), LARGE)
    whole = ledger.path.read_bytes()
    start = whole.index(b"\n") + 1
    ledger.path.write_bytes(whole[: start + cut % (len(whole) - start)])
    assert [entry.charge.id for entry in ledger.entries()] == [charge(0).id]
    ledger.spend(charge(7), LARGE)
    assert [entry.charge.id for entry in ledger.entries()] == [charge(0).id, charge(7).id]
    assert ledger.verify() == []


def test_a_full_disk_releases_nothing_and_leaves_the_ledger_whole(ledger, monkeypatch):
    ledger.spend(charge(1), LARGE)

    def half(handle: int, data: bytes) -> None:
        os.write(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_synced", half)
        with pytest.raises(StorageError, match="nothing is released"):
            ledger.spend(charge(2), LARGE)
    assert len(ledger.entries()) == 1
    ledger.spend(charge(2), LARGE)
    assert ledger.verify() == []


def test_the_line_is_synced_before_spend_returns(ledger, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "write_synced", lambda handle, data: (os.write(handle, data), os.fsync(handle), seen.append(data)))
    ledger.spend(charge(1), LARGE)
    assert len(seen) == 1
    assert ledger.path.read_bytes() == seen[0]


# tampering


def spoiled(ledger: Ledger, number: int, change) -> None:
    lines = ledger.path.read_bytes().split(b"\n")[:-1]
    table = json.loads(lines[number])
    change(table)
    lines[number] = json.dumps(table).encode()
    ledger.path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["charge"]["event"].update(noise=400.0),
        lambda t: t["charge"]["event"].update(count=0),
        lambda t: t["charge"].update(task="other"),
        lambda t: t["charge"].update(kind="nothing"),
        lambda t: t["charge"].update(more=1),
        lambda t: t.update(created="1970"),
        lambda t: t.update(previous="1" * 64),
        lambda t: t.update(hash="0" * 64),
        lambda t: t["signature"].update(signature="00" * 64),
        lambda t: t["signature"].update(key="00" * 32),
        lambda t: t["signature"].update(key=[]),
        lambda t: t.update(signature="x"),
        lambda t: t.pop("signature"),
        lambda t: t.pop("charge"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_changed_line_stops_everything(ledger, change, number):
    for round in range(2):
        ledger.spend(charge(round), LARGE)
    spoiled(ledger, number, change)
    assert f"line {number + 1}" in ledger.verify()[0]
    for act in (ledger.entries, lambda: ledger.spend(charge(9), LARGE), lambda: ledger.require(charge(9), LARGE), ledger.head):
        with pytest.raises(StorageError, match=f"line {number + 1}"):
            act()


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2), (1, 2), (0, 0, 1, 2)])
def test_moved_or_missing_lines_are_found(ledger, order):
    for round in range(3):
        ledger.spend(charge(round), LARGE)
    lines = ledger.path.read_bytes().split(b"\n")
    ledger.path.write_bytes(b"".join(lines[place] + b"\n" for place in order))
    assert ledger.verify()


def test_a_recomputed_chain_lacks_the_signature(ledger):
    ledger.spend(charge(1), LARGE)
    entry = module.Entry(1, charge(1, event=Event(400.0)), "1970", module.START)
    table = {**entry.to_json(), "hash": entry.hash, "signature": json.loads(ledger.path.read_bytes())["signature"]}
    ledger.path.write_bytes(json.dumps(table).encode() + b"\n")
    assert "not signed by" in ledger.verify()[0]


def test_entries_of_another_key_or_without_keys_are_not_trusted(ledger, tmp_path):
    stranger = Ledger(tmp_path / "stranger")
    stranger.spend(charge(1), LARGE)
    ledger.spend(charge(1), LARGE)
    ledger.path.write_bytes(stranger.path.read_bytes())
    assert "not signed by" in ledger.verify()[0]
    for path in (stranger.folder / "keys").iterdir():
        path.unlink()
    assert "not signed by" in stranger.verify()[0]
    with pytest.raises(StorageError):
        stranger.spend(charge(2), LARGE)


def test_entries_taken_from_the_end_show_against_a_known_head(ledger):
    ledger.spend(charge(1), LARGE)
    ledger.spend(charge(2), LARGE)
    known = ledger.head()
    assert known[0] == 2
    ledger.path.write_bytes(ledger.path.read_bytes().split(b"\n")[0] + b"\n")
    assert ledger.verify() == []
    assert "is gone" in ledger.verify(known)[0]
    ledger.spend(charge(3), LARGE)
    assert "is gone" in ledger.verify(known)[0]
    assert ledger.verify((0, module.START)) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_refused_by_name(tmp_path, junk):
    ledger = Ledger(tmp_path)
    ledger.path.write_bytes(junk + b"\n")
    assert "line 1" in ledger.verify()[0]


def test_charges_that_say_nothing_are_refused():
    for wrong in ({"id": ""}, {"task": ""}, {"kind": "other"}, {"unit": "person"}):
        with pytest.raises(PrivacyError, match="ledger"):
            Charge(**({"id": "x", "task": "area", "kind": "adapter", "event": ADAPTER} | wrong))


# command line


def test_the_commands(ledger, capsys):
    for round in range(2):
        ledger.spend(charge(round, sites=("a", "b")), LARGE)
        ledger.spend(charge(round, kind="metrics", event=METRICS, sites=("a", "b")), LARGE)
    at = ["--ledger", str(ledger.folder)]
    assert run(["ledger", "show", *at, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"][0]["epsilon"] == ledger.spent(1e-5, "area")
    assert [row["site"] for row in told["sites"]] == ["a", "b"]
    assert run(["ledger", "show", *at]) == 0
    assert "2 adapter, 2 metrics" in capsys.readouterr().out.replace("\n", "")
    assert run(["ledger", "forecast", *at, "--rounds", "5", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["after 5"] == epsilon([ADAPTER.times(7), METRICS.times(7)], 1e-5) > row["after one"] > row["epsilon"]
    assert run(["ledger", "forecast", *at]) == 0
    assert run(["ledger", "verify", *at]) == 0
    number, mark = ledger.head()
    assert f"{number}:{mark}" in capsys.readouterr().out
    assert run(["ledger", "verify", *at, "--head", f"9:{mark}"]) == PrivacyError.exit_code
    assert run(["ledger", "verify", *at, "--head", "x"]) == ConfigError.exit_code
    spoiled(ledger, 1, lambda table: table.update(created="1970"))
    assert run(["ledger", "verify", *at]) == PrivacyError.exit_code
    assert run(["ledger", "show", "--ledger", str(ledger.folder / "none")]) == StorageError.exit_code
    assert "FEDPEFT_LEDGER" in capsys.readouterr().err
