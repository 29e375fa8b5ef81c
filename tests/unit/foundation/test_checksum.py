"""Checksums are GMAC, whatever the pieces; secrets of a signing key are its own and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

import fedpeft.checksum as module
from fedpeft.checksum import PUBLIC, checksum
from fedpeft.signing import Keys


def aes(key: bytes, block: bytes) -> int:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return int.from_bytes(encryptor.update(block), "big")


def times(x: int, y: int) -> int:
    """Product in GF(2^128), NIST SP 800-38D algorithm 1."""
    product = 0
    for bit in range(127, -1, -1):
        product ^= y if x >> bit & 1 else 0
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def oracle(data: bytes, key: bytes) -> bytes:
    subkey, total = aes(key, bytes(16)), 0
    padded = data + bytes(-len(data) % 16) + (8 * len(data)).to_bytes(8, "big") + bytes(8)
    for start in range(0, len(padded), 16):
        total = times(total ^ int.from_bytes(padded[start : start + 16], "big"), subkey)
    return (total ^ aes(key, bytes(15) + b"\1")).to_bytes(16, "big")


@given(
    parts=st.lists(st.binary(max_size=40), max_size=4), key=st.binary(min_size=16, max_size=16) | st.just(PUBLIC), chunk=st.integers(1, 50)
)
def test_it_is_gmac_of_all_parts_together(parts, key, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        assert checksum(*parts, key=key) == oracle(b"".join(parts), key)


def test_arrays_of_any_type_and_none_are_bytes():
    array = np.arange(5, dtype=np.int32)
    assert checksum(array.data) == checksum(array.tobytes())
    assert checksum(np.zeros(0, np.float32).data) == checksum(b"") == checksum()


def test_secrets_of_a_key_last_and_are_of_one_use_each(tmp_path):
    first = Keys(tmp_path / "a", "p").secret("one")
    assert len(first) == 16
    assert Keys(tmp_path / "a", "p").secret("one") == first
    others = [Keys(tmp_path / "a", "p").secret("two"), Keys(tmp_path / "a", "q").secret("one"), Keys(tmp_path / "b", "p").secret("one")]
    assert len({first, *others}) == 4
