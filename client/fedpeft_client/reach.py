"""Why the coordinator does not answer, in words: by trying, since Flower's SuperNode tries again without a reason."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

TRY_SECONDS = 3.0
AGAIN_SECONDS = 10.0
ALERT = b"\x15\x03"
ASK = b"GET /health HTTP/1.1\r\nHost: fedpeft\r\nConnection: close\r\n\r\n"


def trouble(address: str, roots: Path | None) -> str:
    """What keeps this machine from ``host:port``, or an empty string; ``roots`` is the CA it should be signed by, none for no TLS."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=TRY_SECONDS) as plain:
            return _without_tls(plain) if roots is None else _with_tls(plain, host, roots)
    except socket.gaierror:
        return f"this machine does not know the name {host!r}; check `coordinator` in site.toml"
    except ConnectionRefusedError:
        return f"nobody listens at {address}; is `fedpeft coordinator up` running there?"
    except TimeoutError:
        return f"{address} does not answer; is a firewall in between?"
    except OSError as fault:
        return f"{address}: {fault.strerror or fault}"


def _without_tls(plain: socket.socket) -> str:
    """A listener with TLS takes a plain question for a broken greeting: it sends an alert (RFC 8446, 6), or hangs up, as proxies do."""
    plain.sendall(ASK)
    try:
        spoken = plain.recv(5)
    except ConnectionResetError:
        spoken = b""
    if spoken.startswith(b"HTTP/"):
        return ""
    own = "it speaks TLS and this site does not; set tls.root_certificates to its ca.crt"
    return own if spoken.startswith(ALERT) else f"it hangs up: no coordinator runs behind it yet, or {own}"


def _with_tls(plain: socket.socket, host: str, roots: Path) -> str:
    try:
        with ssl.create_default_context(cafile=str(roots)).wrap_socket(plain, server_hostname=host):
            return ""
    except ssl.SSLCertVerificationError as fault:
        return f"its certificate does not hold: {fault.verify_message}; is {roots} the CA that signed it, and {host} its name?"
    except ssl.SSLError as fault:
        return f"no TLS comes about: {fault.reason or fault}; does it use TLS, and is {roots} a PEM file?"


class Watch:
    """Tries ``look`` again and again on a thread of its own for as long as the block runs; ``found`` is what it said last."""

    def __init__(self, look: Callable[[], str], again: float = AGAIN_SECONDS) -> None:
        self.found = ""
        self._look, self._again, self._ended = look, again, threading.Event()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._run, name="reach", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.found = self._look()
            self._ended.wait(self._again)
