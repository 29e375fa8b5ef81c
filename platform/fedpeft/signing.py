"""Ed25519 signatures for one purpose each: a folder's own key, and the public keys that it trusts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic, write_new

LIMIT = 512
"""Bytes of a signature; ours have about 250."""


@dataclass(frozen=True)
class Keys:
    """The ``folder`` holds ``signing.key`` (mode 0600, made at the first signature), ``signing.pub`` and ``trusted/*.pub``, all PEM.

    ``purpose`` is part of what is signed, so that a signature of a manifest, say, is a signature of nothing else.
    """

    folder: Path
    purpose: str

    @property
    def context(self) -> bytes:
        """What comes before the signed data."""
        return f"fedpeft {self.purpose}\n".encode()

    def public(self) -> str:
        """The own public key (hex of 32 bytes), made where there is none. Raises `StorageError`."""
        return _hex(self._private().public_key())

    def sign(self, data: bytes) -> bytes:
        """A detached signature of ``data`` as JSON that names the signer's public key. Raises `StorageError`, `OSError`."""
        private = self._private()
        table = {"key": _hex(private.public_key()), "signature": private.sign(self.context + data).hex()}
        return (json.dumps(table, sort_keys=True) + "\n").encode()

    def secret(self, use: str) -> bytes:
        """16 bytes that the owner of the private key alone can know, the same for ever, for one ``use``. Raises `StorageError`."""
        return HKDF(SHA256(), 16, salt=None, info=f"fedpeft {self.purpose} {use}".encode()).derive(self._private().private_bytes_raw())

    def fault(self, data: bytes, signature: bytes) -> str | None:
        """What is wrong with ``signature`` of ``data``, or None when a known key made it."""
        try:
            table = _table(signature)
            key, mark = bytes.fromhex(table["key"]), bytes.fromhex(table["signature"])
        except (ValueError, KeyError, TypeError):
            return "the signature is torn"
        if key.hex() not in self.known():
            return f"signed by unknown key {key.hex()[:16]}; pull it from its own registry, or put that key into {self.folder}/trusted"
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(mark, self.context + data)
        except (InvalidSignature, ValueError):
            return f"the signature by key {key.hex()[:16]} does not match what it was made for"
        return None

    @staticmethod
    def signer(signature: bytes) -> str:
        """The public key (hex of 32 bytes) that ``signature`` names. Raises `StorageError` when it is torn."""
        try:
            return bytes.fromhex(_table(signature)["key"]).hex()
        except (ValueError, KeyError, TypeError):
            raise StorageError("signature: torn; get what it signs again") from None

    def known(self) -> frozenset[str]:
        """Public keys (hex of 32 bytes) whose signatures count. Raises `StorageError` when one cannot be read."""
        paths = [self.folder / "signing.pub", *sorted(self.folder.glob("trusted/*.pub"))]
        return frozenset(_hex(_public(path)) for path in paths if path.exists())

    def trust(self, key: str) -> None:
        """Accept signatures of the public ``key`` (hex of 32 bytes) from now on. Raises `OSError`."""
        if key not in self.known():
            write_atomic(self.folder / "trusted" / f"{key[:16]}.pub", _pem(Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))))

    def exposed(self) -> str | None:
        """What is wrong with the private key's permissions, or None."""
        path = self.folder / "signing.key"
        mode = path.stat().st_mode & 0o777 if path.exists() else 0
        return f"{path}: others may read the signing key (mode {mode:o}); run chmod 600 on it" if mode & 0o077 else None

    def _private(self) -> Ed25519PrivateKey:
        path, public = self.folder / "signing.key", self.folder / "signing.pub"
        if not path.exists():
            self._make(path, public)
        try:
            key = load_pem_private_key(_read(path), None)
        except (ValueError, TypeError) as fault:
            raise StorageError(f"{path}: not a private key ({fault}); restore it from a backup") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise StorageError(f"{path}: not an Ed25519 key; restore it from a backup")
        if not public.exists():
            write_atomic(public, _pem(key.public_key()))
        elif _hex(_public(public)) != _hex(key.public_key()):
            raise StorageError(f"{path}: does not belong to {public}; restore the pair from one backup")
        return key

    def _make(self, path: Path, public: Path) -> None:
        if public.exists() and not path.exists():
            raise StorageError(
                f"{path}: the signing key is gone but {public} is there; restore it, or move the .pub into trusted/ to sign with a new one"
            )
        write_new(path, Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)


def verified(data: bytes, signature: bytes, key: str, purpose: str) -> bool:
    """Whether the owner of the public ``key`` (hex of 32 bytes) signed ``data`` for ``purpose``; never raises."""
    try:
        table = _table(signature)
        mark = bytes.fromhex(table["signature"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(mark, f"fedpeft {purpose}\n".encode() + data)
    except (InvalidSignature, ValueError, KeyError, TypeError, UnicodeDecodeError):
        return False
    return bool(table.get("key") == key)


def _table(signature: bytes) -> dict[str, str]:
    """What `Keys.sign` wrote. Raises `ValueError`; a long signature is none, and deep JSON would end the stack."""
    if len(signature) > LIMIT:
        raise ValueError(f"a signature of {len(signature)} bytes")
    table = json.loads(signature)
    if not isinstance(table, dict):
        raise ValueError("no table")
    return table


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise StorageError(f"{path}: cannot be read: {fault.strerror or fault}; restore the key from a backup") from None


def _public(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(_read(path))
    except ValueError as fault:
        raise StorageError(f"{path}: not a public key ({fault}); restore or remove it") from None
    if not isinstance(key, Ed25519PublicKey):
        raise StorageError(f"{path}: not an Ed25519 public key; restore or remove it")
    return key


def _hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
