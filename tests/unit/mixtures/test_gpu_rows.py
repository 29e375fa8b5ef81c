"""The rows that a GPU machine measures, each of them on a tiny model here: a fault there costs what cannot be had again."""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_row_comes_on_both_bases():
    from tests.gpu import mixtures

    found = list(mixtures.run("cpu", 600.0))
    assert not [row for row in found if "fault" in row or "skipped" in row]
    plain = {(row["row"], "nf4" in str(row["case"])) for row in found}
    assert plain == {(name, packed) for name in ("A1", "A1s", "A1b", "A2", "A3", "A5", "A7", "S1") for packed in (False, True)}


def test_a_fault_is_a_row_and_what_no_time_is_left_for_is_named(monkeypatch):
    from tests.gpu import mixtures

    def broken(*_):
        yield {"row": "A1"}
        raise RuntimeError("the card is gone\nand so on")

    for name in ("_trained", "_long", "_mixed", "_served", "_arrow"):
        monkeypatch.setattr(mixtures, name, broken)
    found = list(mixtures.run("cpu", 1e9))
    assert found[:2] == [{"row": "A1"}, {"row": "-", "case": "A1-A3 none 8", "fault": "RuntimeError: the card is gone"}]
    assert all("skipped" in row for row in mixtures.run("cpu", -1.0))
