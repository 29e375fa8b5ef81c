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
    """PEM files: the own certificate and key, and the CA that signed the server's."""

    cert: Path
    key: Path
    ca: Path

    @staticmethod
    def beside(cert: Path) -> Identity:
        """Certificate ``NAME.pem`` with ``NAME.key`` and ``ca.crt`` beside it, as deploy/certificates.py writes them."""
        return Identity(cert, cert.with_suffix(".key"), cert.parent / "ca.crt")

    def check(self) -> None:
        """Raise `ConfigError` when a file is missing, `PolicyError` when the certificate does not hold now or names no role."""
        missing = [str(path) for path in (self.cert, self.key, self.ca) if not path.is_file()]
        if missing:
            raise ConfigError(f"identity {self.cert}: {missing} do not exist; deploy/certificates.py writes NAME.pem, NAME.key and ca.crt")
        fault = read_holder(self.cert).fault()
        if fault:
            raise PolicyError(f"{self.cert}: {fault}")

    @property
    def doubt(self) -> str:
        """Why a server may have turned the certificate away, as far as can be seen here."""
        fault = read_holder(self.cert).fault()
        if fault:
            return fault
        if not signed_by(self.cert.read_bytes(), self.ca.read_bytes()):
            return f"is not signed by {self.ca}; is it of another federation?"
        return "holds here; the server knows another CA, or its clock is wrong"
