"""`fedpeft methods`: every method is listed and explained, costs are those of the layout, what cannot be is refused by name."""

from __future__ import annotations

import json

import pytest

from fedpeft.cli.main import run
from fedpeft.errors import ConfigError
from fedpeft.methods import REFUSED, SPECS


def said(capsys, *arguments: str) -> str:
    assert run(["methods", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list_names_every_method_once_under_its_family(capsys):
    lines = said(capsys).splitlines()
    assert sorted(line.split()[0] for line in lines[1:-1] if line.startswith("  ")) == sorted(SPECS)
    assert {line for line in lines[1:-1] if not line.startswith("  ")} == {spec.family for spec in SPECS.values()}


@pytest.mark.parametrize("name", sorted(SPECS))
def test_show_explains_with_paper_and_averaging(name, capsys):
    text = said(capsys, "show", name)
    assert SPECS[name].summary in text
    assert SPECS[name].paper in text
    assert SPECS[name].averaging in text


def test_costs_are_those_of_the_layout(capsys, small_encoder):
    rows = {row["method"]: row for row in json.loads(said(capsys, "--base", str(small_encoder), "--json", "--family", "reparameterized"))}
    per_layer = 4 * 2 * 8 * 64  # query, key, value, output: A and B of rank 8
    assert rows["lora"]["parameters"] == 2 * per_layer
    assert rows["lora"]["bytes"] == 4 * 2 * per_layer // 2  # alternating: one factor a round
    assert all(row["family"] == "reparameterized" for row in rows.values())


def test_what_only_the_weights_can_count_is_counted_from_them(capsys, small_encoder):
    table = said(capsys, "--base", str(small_encoder), "--family", "selective")
    assert [line.split()[1] for line in table.splitlines() if line.strip().startswith("shira ")] == ["weights"]
    assert "parameters:           " in said(capsys, "show", "shira", "--base", str(small_encoder))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_peft_has_and_is_not_offered_says_why(name, capsys):
    assert run(["methods", "show", name]) == ConfigError.exit_code
    assert REFUSED[name] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["show", "lorra"], ["--family", "additive"], ["--scheme", "fedfoo"]])
def test_unknown_names_are_named_with_what_is_known(arguments, capsys):
    assert run(["methods", *arguments]) == ConfigError.exit_code
    assert "choose one of" in capsys.readouterr().err
