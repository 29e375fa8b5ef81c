"""Configuration files from anywhere: every fault is a ConfigError (or another named fault), never a traceback."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import config
from fedpeft.errors import ConfigError, FedpeftError
from fedpeft.training.config import CentralConfig
from fedpeft_client.config import SiteConfig
from fedpeft_coordinator.config import FederationConfig

MODELS = {"central": CentralConfig, "federation": FederationConfig, "site": SiteConfig}
EXAMPLES = Path(__file__).parents[3] / "deploy" / "configs"
TABLES = {name: tomllib.loads((EXAMPLES / f"{name}.toml").read_text()) for name in MODELS}
SPOILT = [b"\xff\xfe", b"\0", b"a = ", b"a = " + b"9" * 5000, b"a = " + b"[" * 5000, b"a = 1\na = 2", b"[a]\n[a]", b"a = 1979-99-99"]


@pytest.mark.parametrize("name", sorted(MODELS))
@given(data=st.data())
def test_a_garbled_table_is_a_named_fault(name, data, tables):
    table = data.draw(tables(TABLES[name]))
    if not isinstance(table, dict):
        return
    with contextlib.suppress(FedpeftError):
        config.parse(table, MODELS[name], "file.toml")


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kind", [None, 3, [], {}, ["lora"], {"kind": "lora"}, True], ids=repr)
@pytest.mark.parametrize("place", ["method", "scheme", "server", "combine", "mixing", "start"])
def test_a_kind_of_any_type_is_a_named_fault(name, place, kind):
    with pytest.raises(ConfigError, match=r"file\.toml"):
        config.parse({**TABLES[name], place: {"kind": kind}}, MODELS[name], "file.toml")


@given(st.binary(max_size=80))
def test_any_bytes_are_toml_or_a_config_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        config.read_toml(path)


@pytest.mark.parametrize("data", SPOILT, ids=lambda data: repr(data[:12]))
def test_hostile_toml_is_a_config_error(tmp_path, data):
    path = tmp_path / "hostile.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"hostile\.toml"):
        config.read_toml(path)


@given(key=st.text(max_size=12), text=st.text(max_size=12) | st.just("9" * 5000) | st.just("[" * 5000))
def test_settings_of_the_command_line_are_named(tmp_path_factory, key, text):
    path = tmp_path_factory.getbasetemp() / "site.toml"
    path.write_text(tomli_w.dumps(TABLES["site"]))
    with contextlib.suppress(ConfigError):
        config.load(path, SiteConfig, {key: text})
