"""A private CA, a server certificate for the coordinator, key pairs for sites, and certificates and tokens with roles.

OUT/ca.crt is given to every site; OUT/server.pem and OUT/server.key are the coordinator's. Each site gets OUT/SITE.key (private: bring it
to that site only) and OUT/SITE.pub (the coordinator registers it). For the control plane each ``ROLE:NAME``, and each site in role
``site``, gets OUT/ROLE-NAME.pem and OUT/ROLE-NAME.key. Each token gets OUT/ROLE-NAME.token, whose SHA-256 goes with its last day into
OUT/tokens (control.tokens), for callers that show a token under TLS instead of a certificate. OUT/ca.key signs them: keep it off the
coordinator. A second call with the same OUT takes the CA that is there. Private keys are readable by the owner only.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.certificates import LABEL
from fedpeft.control.roles import ROLES
from fedpeft.errors import ConfigError

Key = ec.EllipticCurvePrivateKey
Made = tuple[x509.Certificate, Key]
PEM = serialization.Encoding.PEM
CA_DAYS = 3650
"""A CA outlives what it signs: a new one has to be brought to every site."""


def write(path: Path, data: bytes, mode: int) -> None:
    """Create ``path`` with ``mode``. Raises `ConfigError` when it exists."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ConfigError(f"{path}: exists and is not overwritten; to renew it remove it and what belongs to it, or name another") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def private(key: Key, form: serialization.PrivateFormat) -> bytes:
    """``key`` as unencrypted PEM."""
    return key.private_bytes(PEM, form, serialization.NoEncryption())


def name(common: str) -> x509.Name:
    """A distinguished name with only a common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def alternative(host: str) -> x509.GeneralName:
    """``host`` as an IP address where it is one, else as a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    """A certificate valid from an hour ago for ``days`` days."""
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return made.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(start + datetime.timedelta(days=days))


def signs(*uses: str) -> x509.KeyUsage:
    """What a key may sign; Python 3.13 and newer believe no CA that does not say so (`ssl.VERIFY_X509_STRICT`)."""
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
    )
    return x509.KeyUsage(**{use: use in uses for use in every}, encipher_only=False, decipher_only=False)


def authority(days: int) -> tuple[x509.Certificate, Key]:
    """A self-signed CA that may sign nothing but end certificates."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = name("fedpeft federation CA")
    made = builder(subject, subject, key, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = made.add_extension(signs("key_cert_sign", "crl_sign"), critical=True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return made.sign(key, hashes.SHA384()), key


def authority_of(folder: Path, days: int) -> tuple[x509.Certificate, Key]:
    """The CA in ``folder``, made where there is none."""
    if (folder / "ca.key").exists():
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{folder / 'ca.key'}: is no key that `fedpeft certificates` made; give another folder")
        return x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()), key
    ca, key = authority(max(days, CA_DAYS))
    write(folder / "ca.crt", ca.public_bytes(PEM), 0o644)
    write(folder / "ca.key", private(key, serialization.PrivateFormat.PKCS8), 0o600)
    return ca, key


def end(common: str, names: list[x509.GeneralName], use: x509.ObjectIdentifier, ca: tuple[x509.Certificate, Key], days: int) -> Made:
    """A certificate signed by ``ca`` that may be used for ``use`` and sign nothing."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = builder(name(common), ca[0].subject, key, days)
    made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(signs("digital_signature"), critical=True)
    made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca[1].public_key()), critical=False)
    return made.sign(ca[1], hashes.SHA384()), key


def keep(folder: Path, label: str, made: Made) -> None:
    """Write LABEL.pem and LABEL.key."""
    write(folder / f"{label}.pem", made[0].public_bytes(PEM), 0o644)
    write(folder / f"{label}.key", private(made[1], serialization.PrivateFormat.PKCS8), 0o600)


def parts(who: str) -> tuple[str, str]:
    """Role and name of ``ROLE:NAME``. Raises `ConfigError`."""
    role, _, label = who.partition(":")
    if role not in ROLES or not re.fullmatch(LABEL, label):
        raise ConfigError(f"{who!r}: write ROLE:NAME with a role of {', '.join(ROLES)} and a name of letters, digits, '.', '_', '-'")
    return role, label


def client(folder: Path, who: str, ca: tuple[x509.Certificate, Key], days: int) -> None:
    """A certificate for ``ROLE:NAME``, which it carries as the URI ``fedpeft:ROLE:NAME``."""
    role, label = parts(who)
    uri = x509.UniformResourceIdentifier(f"fedpeft:{role}:{label}")
    keep(folder, f"{role}-{label}", end(f"{role} {label}", [uri], ExtendedKeyUsageOID.CLIENT_AUTH, ca, days))


def token(folder: Path, who: str, days: int) -> None:
    """A token for ``ROLE:NAME``, and a line of OUT/tokens by which the control plane knows it: no secret."""
    role, label = parts(who)
    secret = secrets.token_urlsafe(32)
    write(folder / f"{role}-{label}.token", f"{secret}\n".encode(), 0o600)
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    with (folder / "tokens").open("a", encoding="ascii") as known:
        known.write(f"{who} {hashlib.sha256(secret.encode()).hexdigest()} {until:%Y-%m-%d}\n")


def site(folder: Path, label: str) -> None:
    """An ECDSA key pair for one site, in the OpenSSH forms that Flower's node authentication reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    write(folder / f"{label}.key", private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write(folder / f"{label}.pub", public + b"\n", 0o644)


def issue(
    folder: Path, hosts: Sequence[str], sites: Sequence[str], clients: Sequence[str] = (), days: int = 365, tokens: Sequence[str] = ()
) -> None:
    """Write into ``folder`` all that is asked for.

    Raises:
        ConfigError: a new CA without a host, a name that is none, or a file that is there already.
    """
    if not (hosts or (folder / "ca.key").exists()):
        raise ConfigError(f"{folder}: a new CA needs --host, the name or address by which sites reach the coordinator")
    for label in sites:
        parts(f"site:{label}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca = authority_of(folder, days)
    if hosts:
        names = [alternative(host) for host in hosts]
        keep(folder, "server", end(hosts[0], names, ExtendedKeyUsageOID.SERVER_AUTH, ca, days))
    for label in sites:
        site(folder, label)
        client(folder, f"site:{label}", ca, days)
    for who in clients:
        client(folder, who, ca, days)
    for who in tokens:
        token(folder, who, days)
