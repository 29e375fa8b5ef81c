"""TOML to models: every fault at once, each with key, value and what is allowed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from fedpeft.config import Section, build, describe, load, parse, plugin
from fedpeft.errors import ConfigError
from fedpeft.schemes import SCHEMES, SERVER_OPTIMIZERS, Adam, Alternating


@dataclass(frozen=True)
class Trim:
    fraction: float = 0.1
    kind: ClassVar[str] = "trim"


@dataclass(frozen=True)
class Plain:
    kind: ClassVar[str] = "plain"


KINDS: dict[str, type[Any]] = {"trim": Trim, "plain": Plain}


class Data(Section):
    path: str
    limit: int = 10


class Job(Section):
    name: str
    device: Literal["cpu", "cuda"] = "cpu"
    data: Mapping[str, Data] = {}
    combine: plugin(KINDS, "combine") = Plain()  # type: ignore[valid-type]


def write(tmp_path, text):
    path = tmp_path / "job.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file_becomes_a_frozen_model(tmp_path):
    job = load(write(tmp_path, 'name = "n"\n[data.x]\npath = "a.jsonl"\n[combine]\nkind = "trim"\nfraction = 0.2\n'), Job)
    assert job.combine == Trim(0.2)
    assert job.data["x"] == Data(path="a.jsonl")
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"


def test_every_fault_is_named_at_once(tmp_path):
    path = write(tmp_path, 'nmae = "n"\ndevice = "tpu"\n[data.x]\npath = 3\nlimt = 1\n[combine]\nkind = "trim"\nfrac = 0.2\n')
    with pytest.raises(ConfigError) as caught:
        load(path, Job)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"{path}: ") for line in lines)
    text = "\n".join(lines)
    assert "nmae: unknown key; known keys are ['combine', 'data', 'device', 'name']" in text
    assert "name: is required" in text
    assert "device: Input should be 'cpu' or 'cuda' (got 'tpu')" in text
    assert "data.x.path: Input should be a valid string (got 3)" in text
    assert "data.x.limt: unknown key; known keys are ['limit', 'path']" in text
    assert "combine: trim: unknown keys ['frac']; known keys are ['fraction']" in text


@pytest.mark.parametrize(
    ("text", "fault"), [("name = ", "not valid TOML"), ('name = "a"\nname = "b"', "not valid TOML"), (None, "no such file")]
)
def test_broken_files(tmp_path, text, fault):
    path = write(tmp_path, text) if text is not None else tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=fault) as caught:
        load(path, Job)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path, Job)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, Job)


def test_overrides_read_toml_values_and_bare_words(tmp_path):
    path = write(tmp_path, 'name = "n"\n[data.x]\npath = "a"\n')
    job = load(path, Job, {"name": "m", "data.x.limit": "3", "device": "cuda", "data.y.path": '"b c"'})
    assert (job.name, job.data["x"].limit, job.device, job.data["y"].path) == ("m", 3, "cuda", "b c")
    with pytest.raises(ConfigError, match="name is not a table"):
        load(path, Job, {"name.deep": "1"})
    with pytest.raises(ConfigError, match=r"data.x.limit: .*\(got 'many'\)"):
        load(path, Job, {"data.x.limit": "many"})


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("none", "unknown kind 'none'; known kinds are"),
        ({"fraction": 1}, "needs a table with kind"),
        (3, "needs a table with kind"),
        ({"kind": "trim", "fraction": "much"}, "trim.fraction: .*got 'much'"),
        ({"kind": "trim", "kind2": 1}, r"unknown keys \['kind2'\]"),
    ],
)
def test_bad_plugins(value, fault):
    with pytest.raises(ValueError, match=fault):
        build(KINDS, value, "combine")


@pytest.mark.parametrize(("table", "noun"), [(SCHEMES, "scheme"), (SERVER_OPTIMIZERS, "optimizer"), (KINDS, "combine")])
def test_describe_is_the_inverse_of_build(table, noun):
    for kind, made in table.items():
        one = made()
        assert describe(one)["kind"] == kind
        assert build(table, describe(one), noun) == one
        assert build(table, kind, noun) == one
        assert build(table, one, noun) is one


def test_settings_of_the_real_tables_are_checked():
    assert build(SCHEMES, "alternating", "scheme") == Alternating()
    assert build(SERVER_OPTIMIZERS, {"kind": "adam", "lr": 0.1}, "optimizer") == Adam(0.1)
    for bad in ({"lr": 0.0}, {"lr": -1}, {"beta1": 1.0}, {"tau": 0}, {"lr": "inf"}):
        with pytest.raises(ValueError, match="adam"):
            build(SERVER_OPTIMIZERS, {"kind": "adam", **bad}, "optimizer")


def test_parse_takes_a_table_that_is_already_read():
    assert parse({"name": "n"}, Job, "here") == Job(name="n")
    with pytest.raises(ConfigError, match=r"^here: name: is required"):
        parse({}, Job, "here")
