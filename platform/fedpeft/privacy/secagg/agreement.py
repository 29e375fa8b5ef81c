"""Keys between two sites: X25519 agreement, HKDF to one purpose each, AES-GCM boxes (all from ``cryptography``)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import PrivacyError

SIZE = 32
NONCE = 12


def fresh() -> bytes:
    """A random secret of 255 bits, from the system's generator: a seed, or an X25519 private key."""
    secret = bytearray(secrets.token_bytes(SIZE))
    secret[-1] &= 0x7F
    return bytes(secret)


def public(private: bytes) -> bytes:
    """The X25519 public key of ``private``."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, others: Iterable[bytes], purpose: str, size: int) -> list[bytes]:
    """For each public key of ``others``, ``size`` bytes that only the owners of the two keys know, for one ``purpose``.

    All at once, because loading a private key costs as much as an exchange with it.

    Raises:
        PrivacyError: one of ``others`` is no public key that gives a secret.
    """
    mine = X25519PrivateKey.from_private_bytes(private)
    try:
        return [derive(mine.exchange(X25519PublicKey.from_public_bytes(other)), purpose, size) for other in others]
    except ValueError as fault:
        raise PrivacyError(f"key agreement: the other side's public key is bad ({fault}); the round is left") from None


def derive(secret: bytes, purpose: str, size: int) -> bytes:
    """HKDF-SHA256 of ``secret`` for one ``purpose``."""
    return HKDF(SHA256(), size, salt=None, info=f"fedpeft secagg v1 {purpose}".encode()).derive(secret)


def seal(key: bytes, data: bytes, context: str) -> bytes:
    """``data`` encrypted and bound to ``context``: nonce, ciphertext, tag."""
    nonce = secrets.token_bytes(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, data, context.encode())


def unseal(key: bytes, box: bytes, context: str) -> bytes:
    """Inverse of `seal`. Raises `PrivacyError` when the box was changed or is of another context."""
    try:
        return AESGCM(key).decrypt(box[:NONCE], box[NONCE:], context.encode())
    except (InvalidTag, ValueError):
        raise PrivacyError(f"box {context}: cannot be opened; it was changed on the way, or is of another round") from None
