"""What a site is told when its coordinator does not answer."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedpeft.issuing import issue
from fedpeft_client.config import Auth, SiteConfig
from fedpeft_client.reach import Watch, trouble
from fedpeft_client.supernode import explained


@contextmanager
def listening(context: ssl.SSLContext | None, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[str]:
    """A server on loopback that answers one question, under TLS where there is a ``context``."""

    def talk() -> None:
        with (
            suppress(OSError),
            server.accept()[0] as plain,
            context.wrap_socket(plain, server_side=True) if context else plain as line,
        ):
            line.recv(1)
            line.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=talk)
        thread.start()
        yield f"localhost:{server.getsockname()[1]}"
        thread.join(10)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    issue(folder / "ours", ["localhost"], [])
    issue(folder / "named", ["elsewhere.example.org"], [])
    return folder


def server_of(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


def test_what_keeps_a_site_from_its_coordinator_is_named(keys):
    ours, named = keys / "ours", keys / "named"
    with listening(None) as address:
        assert trouble(address, None) == ""
    with listening(server_of(ours)) as address:
        assert trouble(address, ours / "ca.crt") == ""
    with listening(server_of(ours)) as address:
        assert "it speaks TLS and this site does not; set tls.root_certificates" in trouble(address, None)
    with listening(server_of(ours)) as address:
        assert "its certificate does not hold" in trouble(address, named / "ca.crt")
    with listening(server_of(named)) as address:
        assert "Hostname mismatch" in trouble(address, named / "ca.crt")
    with listening(None) as address:
        assert "no TLS comes about" in trouble(address, ours / "ca.crt")
    with listening(None, answer=b"") as address:
        assert trouble(address, None).startswith("it hangs up: no coordinator runs behind it yet, or it speaks TLS")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert trouble(address, None) == f"nobody listens at {address}; is `fedpeft coordinator up` running there?"


def test_a_watch_tells_the_last_it_found():
    said, looked = iter(["away"]), threading.Event()

    def look() -> str:
        found = next(said, None)
        if found is None:
            looked.set()
        return found or ""

    with Watch(look, 0.01) as watch:
        assert looked.wait(5)
        time.sleep(0.05)
    assert watch.found == ""


def test_a_site_whose_key_is_not_registered_is_told_so(tmp_path):
    site = SiteConfig(name="a", data={"t": {"path": "rows.jsonl"}})
    log = tmp_path / "supernode.log"
    assert explained(site, log) == ""
    log.write_text("Starting Flower SuperNode\n[code: 2004] Failed to activate SuperNode.\n")
    assert "a key of this site, which has none (auth.key), or not yet: its link.node_keys must hold a.pub" in explained(site, log)
    own = site.model_copy(update={"auth": Auth(key=Path("a.key"))})
    assert "does not know a.key of this site" in explained(own, log)
    log.write_text(log.read_text() + "Starting Flower SuperNode\nended for another reason\n")
    assert explained(own, log) == ""
