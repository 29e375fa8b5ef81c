"""``[serve]`` of site.toml: where the API listens, who may call it, and what bounds it."""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fedpeft.config import Section
from fedpeft.control.address import is_address
from fedpeft.errors import ConfigError


class Serve(Section):
    """How the site answers requests.

    ``registry`` is a folder, or a control plane's ``grpc://HOST:PORT``, which ``identity`` (.pem or .token) is shown to; it is looked at
    every ``watch_seconds``. ``router`` decides for ``model = "auto"``. Loopback needs nothing; beyond it keys and TLS must be on
    (``behind_proxy`` says that a proxy before us ends TLS). ``keys`` is a file of one API key a line. ``rows`` requests run at once and
    ``queue`` more wait; ``bite`` prompt tokens are read between two tokens of the others; a request generates at most ``max_tokens``, in
    all its choices together. ``patience_seconds`` is how long running requests may go on when the server stops, ``stall_seconds`` how
    long one write to, or the body of, a caller may take. Where training left the site a private pair (FedDPA), a text's nearness to
    ``own_rows`` of the site's rows, times ``own_scale``, weighs it; with 0 rows it stays out.
    """

    registry: str | None = None
    identity: Path | None = None
    router: str = "chain"
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    keys: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False
    hosts: tuple[str, ...] = ()
    rows: int = Field(default=32, ge=1, le=4096)
    queue: int = Field(default=256, ge=0, le=100_000)
    bite: int = Field(default=512, ge=1)
    own_rows: int = Field(default=16, ge=0, le=1024)
    own_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_tokens: int = Field(default=4096, ge=1)
    max_inputs: int = Field(default=256, ge=1)
    max_body_kb: int = Field(default=1024, ge=1)
    connections: int = Field(default=1024, ge=1)
    watch_seconds: float = Field(default=2.0, gt=0)
    patience_seconds: float = Field(default=30.0, ge=0)
    stall_seconds: float = Field(default=30.0, gt=0)

    @model_validator(mode="after")
    def _closed(self) -> Serve:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("serve.certificate and serve.key belong together; set both or neither")
        if self.loopback:
            return self
        if self.keys is None:
            raise ValueError(f"serve.host {self.host} is beyond loopback and needs serve.keys, a file of one API key a line")
        if self.certificate is None and not self.behind_proxy:
            raise ValueError(
                f"serve.host {self.host} is beyond loopback and needs serve.certificate and serve.key, or serve.behind_proxy = true"
            )
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can call."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Names that a request may be addressed to, so that no page in a browser reaches us under a name of its own; none for any."""
        return self.hosts or (("localhost", "127.0.0.1", "::1", self.host) if self.loopback else ())

    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each API key; none where everyone may call. Raises `ConfigError` when the file is missing, empty or open to others."""
        if self.keys is None:
            return ()
        try:
            lines = self.keys.read_text(encoding="utf-8").splitlines()
            mode = self.keys.stat().st_mode
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"serve.keys: {self.keys} cannot be read: {fault}; write one API key a line there") from None
        if mode & 0o077:
            raise ConfigError(f"serve.keys: {self.keys} can be read by others; run chmod 600 {self.keys}")
        found = tuple(hashlib.sha256(line.strip().encode()).digest() for line in lines if line.strip())
        if not found:
            raise ConfigError(f"serve.keys: {self.keys} holds no key; write one API key a line there")
        return found

    def rooted(self, folder: Path) -> Serve:
        """Relative paths are relative to ``folder``."""
        paths = {name: getattr(self, name) for name in ("identity", "keys", "certificate", "key")}
        update: dict[str, Any] = {name: folder / path.expanduser() for name, path in paths.items() if path is not None}
        if self.registry is not None and not is_address(self.registry):
            update["registry"] = str(folder / Path(self.registry).expanduser())
        return self.model_copy(update=update)
