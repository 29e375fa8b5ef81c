"""The private demo's files are ones that a user could run, and its report says what the ledgers hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpeft.demo import private
from fedpeft.privacy.accounting import Event
from fedpeft.privacy.ledger import Budget, Charge, Ledger
from fedpeft.privacy.settings import Distributed, Example
from fedpeft_client.config import load_site
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.private_rules import settings_of

KINDS = {"without": type(None), "site": Distributed, "row": Example}


@pytest.mark.parametrize("name", private.RUNS)
def test_every_run_loads_masked_and_as_private_as_it_says(tmp_path: Path, name: str) -> None:
    setting = private.settings(tmp_path, 3)[name]
    first, *sites = setting.write(8000)
    federation = load_federation(first)
    assert federation.masks
    assert isinstance(settings_of(federation), KINDS[name])
    assert [sorted(load_site(path).data) for path in sites] == [["area", "error"]] * 3


def test_the_report_tells_every_ledgers_epsilon(tmp_path: Path) -> None:
    made = private.settings(tmp_path, 3)
    budget = Budget(9.0, private.DELTA)
    Ledger(made["site"].folder / "coordinator" / "ledger").spend(Charge("a", "area", "adapter", Event(2.0)), budget)
    Ledger(made["row"].folder / "site-2" / "ledger").spend(Charge("b", "error", "adapter", Event(3.0), unit="example"), budget)
    scores = {name: dict.fromkeys(private.TASKS, 0.5) for name in ("base", *private.RUNS)}
    found = {
        "scores": scores,
        "epsilon": {name: {task: private.spent(setting, task) for task in private.TASKS} for name, setting in made.items()},
        "bytes_up": dict.fromkeys(private.RUNS, 1e6),
        "seconds": dict.fromkeys(private.RUNS, 1.0),
    }
    epsilon = next(line for line in private.lines(found) if line[0] == "epsilon")
    site, row = (Ledger(made[name].folder / where / "ledger") for name, where in (("site", "coordinator"), ("row", "site-2")))
    assert epsilon[2:] == ("none holds", f"{site.spent(1e-5):.2f}", f"{row.spent(1e-5, unit='example'):.2f}")
    page = private.markdown(json.loads(json.dumps(found)))
    assert "| bytes up a round |  | 1,000,000 | 1,000,000 | 1,000,000 |" in page
    assert page.count("\n|") >= 6
