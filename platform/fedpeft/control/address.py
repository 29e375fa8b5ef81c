"""Where a control plane listens, and what a caller shows it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from fedpeft.certificates import read_holder, signed_by
from fedpeft.errors import ConfigError, PolicyError

FORM = re.compile(r"(grpc|grpc-insecure)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})/?")


@dataclass(frozen=True)
class Address:
    """``grpc://host:port``; ``grpc-insecure://`` for one beyond loopback that has no TLS."""

    host: str
    port: int
    insecure: bool = False

    @staticmethod
    def parse(text: str) -> Address:
        """Read an address. Raises `ConfigError`."""
        found = FORM.fullmatch(text)
        if found is None or not 0 < int(found[3]) < 1 << 16:
            raise ConfigError(f"{text!r}: is no address of a control plane; write grpc://HOST:PORT")
        return Address(found[2].strip("[]"), int(found[3]), found[1] == "grpc-insecure")

    @property
    def target(self) -> str:
        """As gRPC wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"grpc{'-insecure' if self.insecure else ''}://{self.target}"


def is_address(text: str) -> bool:
    """Whether ``text`` names a control plane rather than a folder."""
    return text.startswith(("grpc://", "grpc-insecure://"))


def loopback(host: str) -> bool:
    """Whether ``host`` is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Identity:
    """PEM files: the own certificate and key, and the CA that signed the server's; or that CA and a file with a token."""

    cert: Path | None
    key: Path | None
    ca: Path
    token: Path | None = None

    @staticmethod
    def beside(shown: Path) -> Identity:
        """``NAME.token``, or ``NAME.pem`` with ``NAME.key``; ``ca.crt`` beside either, as `fedpeft certificates` writes them."""
        ca = shown.parent / "ca.crt"
        return Identity(None, None, ca, shown) if shown.suffix == ".token" else Identity(shown, shown.with_suffix(".key"), ca)

    def check(self) -> None:
        """Raise `ConfigError` when a file is missing or open to others, `PolicyError` when the certificate does not hold or has no role."""
        missing = [str(path) for path in (self.cert, self.key, self.ca, self.token) if path is not None and not path.is_file()]
        if missing:
            raise ConfigError(
                f"identity {self.cert or self.token}: {missing} do not exist; `fedpeft certificates` writes NAME.pem with NAME.key, "
                "NAME.token, and ca.crt"
            )
        if self.token is not None and self.token.stat().st_mode & 0o077:
            raise ConfigError(f"identity {self.token}: can be read by others; run chmod 600 {self.token}")
        fault = None if self.cert is None else read_holder(self.cert).fault()
        if fault:
            raise PolicyError(f"{self.cert}: {fault}")

    @property
    def secret(self) -> str | None:
        """The token. Raises `ConfigError` when its file is empty or no text."""
        try:
            text = None if self.token is None else self.token.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            text = ""
        if text is not None and (not text or len(text.split()) > 1):
            raise ConfigError(f"identity {self.token}: holds no token; `fedpeft certificates --token ROLE:NAME` writes one")
        return text

    @property
    def doubt(self) -> str:
        """Why a server may have turned the certificate away, as far as can be seen here."""
        if self.cert is None:
            return "is none; this server asks for a certificate (NAME.pem), not for a token"
        fault = read_holder(self.cert).fault()
        if fault:
            return fault
        if not signed_by(self.cert.read_bytes(), self.ca.read_bytes()):
            return f"is not signed by {self.ca}; is it of another federation?"
        return "holds here; the server knows another CA, or its clock is wrong"
