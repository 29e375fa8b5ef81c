"""``[control]`` of federation.toml, or a file of its own for `fedpeft coordinator serve`: where the control plane listens and stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpeft import certificates
from fedpeft.config import Section
from fedpeft.control.address import loopback
from fedpeft.control.roles import ROLES
from fedpeft.errors import ConfigError
from fedpeft_coordinator.listening import Tls, guarded, rooted

Role = Literal["reader", "site", "publisher", "monitor", "operator"]
LABEL = f"^({'|'.join(ROLES)}):{certificates.LABEL}$"
SCOPED = f"^({'|'.join(ROLES)})(:{certificates.LABEL})?$"


class Control(Section):
    """Where the control plane listens; beyond loopback ``tls`` is required, and then every caller shows a certificate, or a token.

    Attributes:
        anonymous: the role of callers without TLS; absent: operator on loopback, reader beyond it (``insecure = true``).
        tokens: a file with a line ROLE:NAME SHA256 EXPIRY for each token (`fedpeft certificates --token`); with it callers show tokens
            under TLS, and no certificates. It is read again when it changes.
        revoked: callers (ROLE:NAME) whose certificates or tokens count no longer.
        scopes: by caller (ROLE:NAME, or ROLE for all others of it) the only tasks that it may see and change; absent: all tasks.
        store: an fsspec URL (s3://bucket/place) for versions; absent: the registry's folder.
        database: an SQLAlchemy URL for histories; absent: files, or SQLite in the registry's folder where ``store`` is a URL.
        base: identity of the base that pushed versions must be for; absent: that of the versions that are there.
        embed: whether texts are routed here, which loads base and encoder in the background as soon as a version is served.
        max_version: bytes of one pushed version; ``staging``: bytes of all broken pushes together.
        poll: seconds between looks for what other processes published.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8001, ge=0, le=65535)
    tls: Tls | None = None
    insecure: bool = False
    anonymous: Role | None = None
    tokens: Path | None = None
    revoked: tuple[Annotated[str, Field(pattern=LABEL)], ...] = ()
    scopes: dict[Annotated[str, Field(pattern=SCOPED)], Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)
    store: str | None = None
    database: str | None = None
    base: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    embed: bool = True
    max_version: int = Field(default=1 << 30, ge=1)
    staging: int = Field(default=8 << 30, ge=1)
    poll: float = Field(default=0.5, gt=0.0)

    @model_validator(mode="after")
    def _guarded(self) -> Control:
        guarded("control", self.host, self.tls, self.insecure)
        if self.tls is not None and self.anonymous is not None:
            raise ValueError("control.anonymous and [control.tls]: with TLS every caller shows a certificate or a token; set one of them")
        if self.tokens is not None and self.tls is None:
            raise ValueError("control.tokens needs [control.tls]: tokens travel under TLS only; `fedpeft certificates` makes both")
        return self

    def rooted(self, folder: Path, name: str) -> Control:
        """Paths relative to ``folder`` made whole. Raises `ConfigError` when a file does not exist; ``name`` says whose they are."""
        tokens = None if self.tokens is None else folder / self.tokens.expanduser()
        if tokens is not None and not tokens.is_file():
            raise ConfigError(f"{name}.tokens: {tokens} does not exist; `fedpeft certificates --token ROLE:NAME` makes it")
        return self.model_copy(update={"tls": rooted(self.tls, folder, f"{name}.tls"), "tokens": tokens})

    @property
    def role(self) -> Role:
        """The role of callers without TLS."""
        return self.anonymous or ("operator" if loopback(self.host) else "reader")
