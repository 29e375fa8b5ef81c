"""Who a certificate speaks for: its role and name from the URI ``fedpeft:ROLE:NAME`` among its alternative names, and how long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedpeft.errors import ConfigError, PolicyError

LABEL = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
"""What a caller in a role may be called."""
SOON = 30
"""Days."""
URI = re.compile(rf"fedpeft:([a-z]+):({LABEL})")


@dataclass(frozen=True)
class Holder:
    """What a certificate says: the ``role`` of ``name`` (both empty where it names none), valid from ``since`` to ``until`` (UTC)."""

    role: str
    name: str
    since: datetime
    until: datetime

    @property
    def label(self) -> str:
        """For people and logs."""
        return f"{self.role}:{self.name}"

    def fault(self, now: datetime | None = None) -> str | None:
        """Why it does not speak for anybody ``now``, or None."""
        missing = "names no role (no URI fedpeft:ROLE:NAME); issue one with `fedpeft certificates --client ROLE:NAME`"
        return self.lapse(now) or (None if self.role else missing)

    def lapse(self, now: datetime | None = None) -> str | None:
        """Why it is not valid ``now``, or None."""
        now = now or datetime.now(UTC)
        if now > self.until:
            return f"expired on {self.until:%Y-%m-%d %H:%M} UTC; issue a new one with `fedpeft certificates`"
        if now < self.since:
            return f"is not valid before {self.since:%Y-%m-%d %H:%M} UTC; check this machine's clock"
        return None


def lapsing(path: Path, now: datetime | None = None) -> str:
    """That the certificate in ``path`` ends within `SOON` days; empty where it does not.

    Raises:
        ConfigError: it is missing or no certificate.
        PolicyError: it is not valid ``now``.
    """
    found, now = read_holder(path), now or datetime.now(UTC)
    if why := found.lapse(now):
        raise PolicyError(f"{path}: {why}")
    days = (found.until - now).days
    return f"{path} holds for {days} days only; issue a new one with `fedpeft certificates`" if days < SOON else ""


def holder(pem: bytes) -> Holder:
    """Read the first certificate of ``pem``. Raises `ValueError` when it is none; chain and signature are TLS's to check."""
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    found = [match for uri in uris if (match := URI.fullmatch(uri))]
    role, name = found[0].groups() if len(found) == 1 else ("", "")
    return Holder(role, name, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def read_holder(path: Path) -> Holder:
    """`holder` of a PEM file. Raises `ConfigError` when it is missing or no certificate."""
    try:
        return holder(path.read_bytes())
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror or fault}; `fedpeft certificates` makes certificates") from None
    except ValueError as fault:
        raise ConfigError(f"{path}: is no PEM certificate ({fault}); `fedpeft certificates` makes certificates") from None


def signed_by(pem: bytes, ca: bytes) -> bool:
    """Whether the certificate ``pem`` was signed by ``ca`` itself."""
    try:
        x509.load_pem_x509_certificate(pem).verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True
