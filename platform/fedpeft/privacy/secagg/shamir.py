"""Shamir's secret sharing (1979) of 255-bit integers over the prime field of 2^256 - 189."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

from fedpeft.errors import PrivacyError

PRIME = 2**256 - 189
SIZE = 32
"""Bytes of a secret and of a share."""
LIMIT = 1 << 255
WIDE = 48
"""Bytes that give a coefficient: 128 bits more than the field, so that the remainder is uniform."""


def split(secret: bytes, threshold: int, count: int, entropy: bytes) -> list[bytes]:
    """Shares at 1, ..., ``count``; any ``threshold`` of them give ``secret`` back, fewer say nothing about it.

    The polynomial comes from ``entropy``, as secret as the secret itself, so that dealing again deals the same shares.

    Raises:
        PrivacyError: the secret is not `SIZE` bytes below 2^255, or the threshold is not in 1..count.
    """
    value = int.from_bytes(secret, "little")
    if len(secret) != SIZE or value >= LIMIT:
        raise PrivacyError(f"secret sharing: a secret is {SIZE} bytes below 2^255, this has {len(secret)}")
    if not 1 <= threshold <= count:
        raise PrivacyError(f"secret sharing: threshold {threshold} of {count} shares; it must be between 1 and {count}")
    noise = hashlib.shake_256(b"fedpeft shamir\n" + entropy).digest(WIDE * (threshold - 1))
    highest_first = [*(int.from_bytes(noise[i : i + WIDE], "little") % PRIME for i in range(0, len(noise), WIDE)), value]
    return [_evaluate(highest_first, x).to_bytes(SIZE, "little") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from shares by the point at which they were taken; more than ``threshold`` must agree with one another.

    Raises:
        PrivacyError: too few shares, or shares of different secrets or tampered ones.
    """
    if len(shares) < threshold:
        raise PrivacyError(f"secret sharing: {len(shares)} shares, {threshold} are needed")
    points = tuple(sorted(shares))
    values = {x: int.from_bytes(shares[x], "little") for x in points}
    value = _at(points[:threshold], values, 0)
    if any(_at(points[:threshold], values, x) != values[x] for x in points[threshold:]):
        raise PrivacyError("secret sharing: the shares do not lie on one polynomial; one of them was tampered with")
    if value >= LIMIT:
        raise PrivacyError("secret sharing: the shares give no secret; one of them was tampered with")
    return value.to_bytes(SIZE, "little")


def _evaluate(highest_first: Sequence[int], x: int) -> int:
    """Horner's rule with one reduction at the end: ``x`` is small, so the numbers stay short."""
    total = 0
    for coefficient in highest_first:
        total = total * x + coefficient
    return total % PRIME


def _at(points: tuple[int, ...], values: Mapping[int, int], x: int) -> int:
    weights = _lagrange(points, x)
    return sum(weight * values[point] for weight, point in zip(weights, points, strict=True)) % PRIME


@lru_cache(maxsize=4096)
def _lagrange(points: tuple[int, ...], x: int) -> tuple[int, ...]:
    """Weights of the values at ``points`` in the value at ``x``: one set serves all secrets of a round."""
    whole = prod(x - point for point in points) % PRIME
    return tuple(whole * weight * _inverse(x - point) % PRIME for point, weight in zip(points, _barycentric(points), strict=True))


@lru_cache(maxsize=512)
def _barycentric(points: tuple[int, ...]) -> tuple[int, ...]:
    """1 / prod (x_j - x_m) over m != j: what the weights at all values of x share, so that each costs one product a point."""
    return tuple(pow(prod(mine - other for other in points if other != mine), -1, PRIME) for mine in points)


@lru_cache(maxsize=65536)
def _inverse(step: int) -> int:
    """1 / ``step`` in the field; differences of points are small and come again in every set of them."""
    return pow(step, -1, PRIME)
