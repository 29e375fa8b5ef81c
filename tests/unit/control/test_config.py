"""``[control]`` and `fedpeft coordinator serve`: what is refused, and how it is said."""

from __future__ import annotations

import socket

import pytest

from fedpeft import issuing
from fedpeft.cli.main import run
from fedpeft.config import parse
from fedpeft.errors import ConfigError, LinkError, PolicyError
from fedpeft.registry import Registry
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.control.serve import credentials
from fedpeft_coordinator.control.settings import Settings
from fedpeft_coordinator.listening import Tls
from fedpeft_coordinator.status import Watched

FEDERATION = 'name = "demo"\n[control]\nport = 8123\n[tasks.colour]\nkind = "classification"\nlabels = ["a", "b"]\n'


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"host": "0.0.0.0"}, "reachable from outside and \\[control.tls\\] is missing"),
        ({"tls": {"ca": "a", "cert": "b", "key": "c"}, "anonymous": "reader"}, "with TLS every caller shows a certificate"),
        ({"anonymous": "king"}, "anonymous"),
        ({"revoked": ["king:x"]}, "revoked"),
        ({"bas": "x"}, "unknown key"),
        ({"base": "x"}, "base"),
    ],
)
def test_settings_that_cannot_hold(table, fault):
    with pytest.raises(ConfigError, match=fault):
        parse(table, Control, "control")


def test_who_is_who_without_tls():
    assert Control().role == Control(host="::1").role == "operator"
    assert Control(host="0.0.0.0", insecure=True).role == "reader"
    assert Control(anonymous="site").role == "site"


def test_settings_travel_to_the_process(tmp_path):
    (tmp_path / "federation.toml").write_text(FEDERATION)
    config = load_federation(tmp_path / "federation.toml")
    assert config.control is not None
    settings = Settings(config.control, config.registry_folder, tmp_path, Watched.of(config))
    settings.save(tmp_path / "settings.json")
    assert Settings.read(tmp_path / "settings.json") == settings
    assert (tmp_path / "settings.json").stat().st_mode & 0o077 == 0
    (tmp_path / "federation.toml").write_text(FEDERATION.replace("port = 8123", 'tls = { ca = "x", cert = "y", key = "z" }'))
    with pytest.raises(ConfigError, match=r"control.tls.ca: .*x does not exist"):
        load_federation(tmp_path / "federation.toml")


def test_serve_says_what_is_wrong(tmp_path, capsys):
    def said(*arguments: str, code: int) -> str:
        assert run(["coordinator", "serve", *arguments]) == code
        return capsys.readouterr().err

    assert "no such folder" in said(str(tmp_path / "none"), code=ConfigError.exit_code)
    assert "prot: unknown key" in said(str(tmp_path), "--set", "prot=1", code=ConfigError.exit_code)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen there" in said(str(tmp_path), "--set", f"port={port}", code=LinkError.exit_code)


def test_a_server_does_not_start_with_an_expired_certificate(certificates, tmp_path):
    ours = certificates / "ours"
    late = issuing.end(
        "late", [issuing.alternative("localhost")], issuing.ExtendedKeyUsageOID.SERVER_AUTH, issuing.authority_of(ours, 1), 0
    )
    issuing.keep(tmp_path, "server", late)
    with pytest.raises(PolicyError, match=r"server.pem: expired on"):
        credentials(Tls(ca=ours / "ca.crt", cert=tmp_path / "server.pem", key=tmp_path / "server.key"))
    assert not Registry(tmp_path / "r").root.exists()
