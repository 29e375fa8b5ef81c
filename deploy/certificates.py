"""Make a private CA, a server certificate for the coordinator, and key pairs for sites.

    python deploy/certificates.py OUT --host coordinator.example.org --host 10.0.0.5 --site hospital-a --site hospital-b

Writes OUT/ca.crt (give it to every site), OUT/server.pem and OUT/server.key (the coordinator's), and for each site
OUT/SITE.key (private: bring it to that site only) and OUT/SITE.pub (the coordinator registers it). Private keys are
readable by the owner only. Existing files are never overwritten.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey
PEM = serialization.Encoding.PEM


def write(path: Path, data: bytes, mode: int) -> None:
    """Create ``path`` with ``mode``; fail when it exists."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    print(path)


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


def authority(days: int) -> tuple[x509.Certificate, Key]:
    """A self-signed CA that may sign nothing but end certificates."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = name("fedpeft federation CA")
    made = builder(subject, subject, key, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return made.sign(key, hashes.SHA384()), key


def server(hosts: list[str], ca: x509.Certificate, ca_key: Key, days: int) -> tuple[x509.Certificate, Key]:
    """A server certificate for ``hosts``, signed by the CA."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = builder(name(hosts[0]), ca.subject, key, days)
    made = made.add_extension(x509.SubjectAlternativeName([alternative(host) for host in hosts]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    return made.sign(ca_key, hashes.SHA384()), key


def site(folder: Path, label: str) -> None:
    """An ECDSA key pair for one site, in the OpenSSH forms that Flower's node authentication reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    write(folder / f"{label}.key", private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write(folder / f"{label}.pub", public + b"\n", 0o644)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--host", action="append", required=True, help="name or address by which sites reach the coordinator")
    parser.add_argument("--site", action="append", default=[], help="make a key pair for this site")
    parser.add_argument("--days", type=int, default=365)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca, ca_key = authority(arguments.days)
    certificate, key = server(arguments.host, ca, ca_key, arguments.days)
    write(arguments.out / "ca.crt", ca.public_bytes(PEM), 0o644)
    write(arguments.out / "ca.key", private(ca_key, serialization.PrivateFormat.PKCS8), 0o600)
    write(arguments.out / "server.pem", certificate.public_bytes(PEM), 0o644)
    write(arguments.out / "server.key", private(key, serialization.PrivateFormat.PKCS8), 0o600)
    for label in arguments.site:
        site(arguments.out, label)


if __name__ == "__main__":
    main()
