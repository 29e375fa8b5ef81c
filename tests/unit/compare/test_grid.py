"""Combinations of settings: what the command line says, and what becomes of the files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.compare.grid import Cell, cells, parts, varied
from fedpeft.errors import ConfigError

VALUE = st.sampled_from(["1", "fedavg", "[1, 2]", '{ kind = "lora", r = 4 }', "'a, b'", '"x,]"', "[[1], {a = 'q,'}]"])


@given(st.lists(VALUE, min_size=1, max_size=5))
def test_values_part_at_commas_outside_brackets_and_quotes(values: list[str]) -> None:
    assert list(parts(",".join(values))) == values


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        (["scheme.kind"], "key=value,value"),
        (["=fedavg"], "key=value,value"),
        (["scheme.kind=fedavg,"], "key=value,value"),
        (["rounds=1", "rounds=2"], "rounds=1,2"),
        (["seed=1,2"], "--seeds"),
    ],
)
def test_what_is_no_setting_is_refused_with_the_form(pairs: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        varied(pairs)


def test_every_combination_is_there_once_with_every_seed() -> None:
    made = cells(varied(["a=1,2,2", "b=x"]), 7, 2)
    assert [cell.said for cell in made] == ["a=1 b=x seed=7", "a=1 b=x seed=8", "a=2 b=x seed=7", "a=2 b=x seed=8"]
    assert [cell.said for cell in cells({}, 0, 1)] == ["seed=0"]


def test_a_kind_keeps_what_the_file_says_of_it_and_another_begins_from_its_defaults() -> None:
    table = {"method": {"kind": "lora", "r": 16}, "base": {"model": "minilm"}}
    assert Cell({"method": "lora"}, 1).applied(table) == {**table, "seed": 1}
    assert Cell({"method": "ia3"}, 1).applied(table)["method"] == "ia3"
    assert Cell({"method.r": "4"}, 1).applied(table)["method"] == {"kind": "lora", "r": 4}
    assert table == {"method": {"kind": "lora", "r": 16}, "base": {"model": "minilm"}}


def test_sites_take_over_what_they_share_with_the_federation() -> None:
    cell = Cell({"base.max_tokens": "32", "rounds": "3"}, 0)
    assert cell.held({"name": "a", "base": {"max_tokens": 64}}) == {"name": "a", "base": {"max_tokens": 32}}
