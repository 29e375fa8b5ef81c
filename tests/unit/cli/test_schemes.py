"""`fedpeft schemes`: every scheme is listed and explained, and its share of bytes is the layout's."""

from __future__ import annotations

import json

import pytest

from fedpeft.cli.main import run
from fedpeft.errors import ConfigError
from fedpeft.schemes import SCHEMES


def test_every_scheme_is_listed_with_what_it_sends(capsys):
    assert run(["schemes", "--json"]) == 0
    rows = {row["scheme"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == sorted(SCHEMES)
    assert rows["alternating"]["share"] == rows["ffa"]["share"] == 0.5
    assert rows["alternating"]["exact"]
    assert not rows["fedavg"]["exact"]
    assert rows["fedsb"]["share"] == pytest.approx(32 * 32 / (2 * 32 * 768 + 32 * 32))


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_show_explains(name, capsys):
    assert run(["schemes", "show", name]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_an_unknown_scheme_is_named(capsys):
    assert run(["schemes", "show", "fedfoo"]) == ConfigError.exit_code
    assert "choose one of" in capsys.readouterr().err
