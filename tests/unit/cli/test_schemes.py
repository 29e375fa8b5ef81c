"""`fedpeft schemes` and `fedpeft combine`: every scheme is listed and explained, and its share of bytes is the layout's."""

from __future__ import annotations

import json

import pytest

from fedpeft.cli.main import run
from fedpeft.errors import ConfigError
from fedpeft.schemes import SCHEMES
from fedpeft.schemes.robust import COMBINES


def test_every_scheme_is_listed_with_what_it_sends(capsys):
    assert run(["schemes", "--json"]) == 0
    rows = {row["scheme"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == sorted(SCHEMES)
    assert rows["alternating"]["share"] == rows["ffa"]["share"] == 0.5
    assert rows["alternating"]["exact"]
    assert not rows["fedavg"]["exact"]
    assert rows["fedsb"]["share"] == pytest.approx(32 * 32 / (2 * 32 * 768 + 32 * 32))


def test_every_rule_is_listed_with_what_it_holds_against_and_what_masks_hide(capsys):
    assert run(["combine", "--json"]) == 0
    rows = {row["rule"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == sorted([*COMBINES, "sum"])
    assert {name for name, row in rows.items() if row["masks"] != "nothing"} == {"sum", "buckets"}
    assert {name for name, row in rows.items() if not row["two_factors"]} == {"median", "trimmed", "bulyan"}
    assert (rows["krum"]["least"], rows["bulyan"]["least"], rows["buckets"]["least"]) == (5, 7, 15)
    assert run(["combine"]) == 0
    assert "fewer than half of the sites" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "name"), [*(("schemes", name) for name in sorted(SCHEMES)), *(("combine", name) for name in sorted(COMBINES))]
)
def test_show_explains(verb, name, capsys):
    assert run([verb, "show", name]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize("verb", ["schemes", "combine"])
def test_an_unknown_name_is_told_the_known_ones(verb, capsys):
    assert run([verb, "show", "fedfoo"]) == ConfigError.exit_code
    assert "choose one of" in capsys.readouterr().err
