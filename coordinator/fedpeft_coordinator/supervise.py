"""The guarded SuperLink as a child: started, watched, restarted when it dies, ended with us; and the runs on it."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import FedpeftError, LinkError, StorageError
from fedpeft.processes import free_port, last_words
from fedpeft_coordinator.admission import Admission
from fedpeft_coordinator.children import Child, Tell
from fedpeft_coordinator.config import Link
from fedpeft_coordinator.link import LinkSettings

if TYPE_CHECKING:
    from fedpeft.wire._compat import Endpoint
    from fedpeft_coordinator.transport_flower import Session

START_SECONDS = 90.0
"""A loaded machine may need a minute to import a web server."""
STUB = ("fedpeft_coordinator.app:app", "fedpeft_client.app:app")


@dataclass
class LinkProcess:
    """``python -m fedpeft_coordinator.link`` with its files in ``folder``; ``tell`` hears of every start."""

    link: Link
    folder: Path
    tell: Tell = lambda *_a, **_k: None
    _child: Child | None = None
    _admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self._admission = Admission(self.link.node_keys, lambda: self.endpoint, self.tell)

    def start(self) -> None:
        """Start the child and the thread that restarts it. Raises `LinkError` when its port is taken, `StorageError` without space."""
        check_port(self.link.host, self.link.port)
        self._private = free_port()
        secret = self._prepare()
        self._endpoint_secret = secret
        module, settings = "fedpeft_coordinator.link", (self.folder / "link.json").resolve()
        env = {"FLWR_HOME": str((self.folder / "flwr").resolve()), "OMP_NUM_THREADS": "1"}
        self._child = Child("link", [sys.executable, "-m", module, str(settings)], self.folder / "link.log", env, self.tell)
        self._child.start()
        if self.link.node_auth:
            threading.Thread(target=self._welcome, name="welcome", daemon=True).start()

    def stop(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.stop()

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._child is None else self._child.pid

    @property
    def endpoint(self) -> Endpoint:
        """The private listener."""
        from fedpeft.wire._compat import Endpoint

        return Endpoint(f"127.0.0.1:{self._private}", self._endpoint_secret)

    @property
    def barred(self) -> frozenset[str]:
        """Registered sites whose keys were taken away."""
        return self._admission.barred

    @property
    def _stopping(self) -> bool:
        return self._child is not None and self._child.stopping

    def connect(self) -> Session:
        """Open a run on the link: wait for it, admit the registered sites, submit the stub, take its ServerApp task ourselves.

        Raises:
            LinkError: the link does not come up; its log's last line says why.
        """
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self._wait_until_up(end)
                return self._open_run()
            except LinkError:
                if time.monotonic() >= end or self._stopping:
                    raise
                time.sleep(0.5)

    def _open_run(self) -> Session:
        from fedpeft.wire._compat import LinkGrid, RunLost, Stub, acquire_serverapp, submit_stub
        from fedpeft_coordinator.transport_flower import Session

        if self.link.node_auth:
            self._admission.settle()
        submit_stub(self.endpoint, Stub(*STUB))
        token = acquire_serverapp(self.endpoint)
        if token is None:
            raise RunLost("the new run is not there; was the link restarted meanwhile?")
        run = LinkGrid(self.endpoint, token)
        run.__enter__()
        return Session(run.grid, run.close)

    def _welcome(self) -> None:
        """Let the sites in while the base is built: a refused SuperNode ends, and waits longer each time. A fault is for `connect`."""
        with suppress(FedpeftError):
            self._wait_until_up(time.monotonic() + START_SECONDS)
            self._admission.settle()
        self._admission.keep(lambda: self._stopping)

    def _prepare(self) -> bytes:
        """Write secret and settings for the child."""
        secret = secrets.token_bytes(32)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "secret"
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secret)
            tls = self.link.tls
            LinkSettings(
                host=self.link.host,
                port=self.link.port,
                private_port=self._private,
                secret_file=str(path.resolve()),
                certificate=None if tls is None else str(tls.cert),
                key=None if tls is None else str(tls.key),
                node_auth=self.link.node_auth,
            ).save(self.folder / "link.json")
        except OSError as fault:
            raise StorageError(f"{self.folder}: cannot be written: {fault.strerror}; free space or check permissions") from None
        return secret

    def _wait_until_up(self, end: float) -> None:
        while time.monotonic() < end and not self._stopping:
            if listens("127.0.0.1", self._private) and listens(self.link.host, self.link.port):
                return
            time.sleep(0.1)
        log = self.folder / "link.log"
        raise LinkError(f"the link does not come up: {last_words(log)} (log: {log})")


def check_port(host: str, port: int, name: str = "link") -> None:
    """Raise `LinkError` when somebody listens at ``host:port`` or the address is not ours; ``name`` is the table that sets it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as fault:
            raise LinkError(f"{name} {host}:{port}: {fault.strerror}; stop what listens there, or set {name}.port") from None


def listens(host: str, port: int) -> bool:
    """Whether somebody answers at ``host:port``."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((target, port), timeout=1.0):
            return True
    except OSError:
        return False
