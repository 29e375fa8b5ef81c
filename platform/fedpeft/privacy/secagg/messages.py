"""What sites and coordinator say to each other in secure aggregation: plain values, no bytes of a wire."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg.graph import LEAST, Shape, neighbours, shape


@dataclass(frozen=True)
class Instance:
    """One masked sum: its ``name`` (never used twice), who takes part, what shares of them may collude and vanish.

    ``least``: survivors below which nothing is opened. Graph and thresholds follow from these values, so every site
    computes them itself.
    """

    name: str
    members: tuple[str, ...]
    colluding: float = 0.1
    dropping: float = 0.2
    least: int = LEAST

    def __post_init__(self) -> None:
        if len(set(self.members)) < len(self.members) or self.least < LEAST:
            raise PrivacyError(f"secure aggregation {self.name}: members must differ and least = {self.least} must be at least {LEAST}")

    @cached_property
    def shape(self) -> Shape:
        """Degree and thresholds. Raises `PrivacyError` when there are too few members."""
        return shape(len(self.members), self.colluding, self.dropping)

    @property
    def fewest(self) -> int:
        """The fewest sites over which the sum is opened. Raises `PrivacyError` when there are too few members."""
        return max(self.least, self.shape.quorum if self.shape.complete else 0)

    @cached_property
    def graph(self) -> dict[str, tuple[str, ...]]:
        """Neighbours by member."""
        return neighbours(self.members, self.shape.degree, self.digest)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it."""
        row = [self.name, sorted(self.members), self.colluding, self.dropping, self.least]
        return hashlib.sha256(json.dumps(row).encode()).digest()

    def require(self, count: int, what: str) -> None:
        """Raise `PrivacyError` unless ``count`` members are enough to go on."""
        if count < self.fewest:
            raise PrivacyError(
                f"secure aggregation {self.name}: {count} of {len(self.members)} sites {what}, {self.fewest} are needed; nothing is opened"
            )


@dataclass(frozen=True)
class Bundle:
    """A site's fresh public keys for one instance and the check value of its self-mask seed, signed by the site."""

    site: str
    mask_key: bytes
    box_key: bytes
    seed_check: bytes
    signature: bytes = b""

    def signed(self, instance: Instance) -> bytes:
        """What the signature covers."""
        parts = (instance.digest, self.site.encode(), self.mask_key, self.box_key, self.seed_check)
        return b"bundle\n" + b"\n".join(part.hex().encode() for part in parts)


@dataclass(frozen=True)
class Box:
    """Two shares for one neighbour, readable by it alone."""

    sender: str
    recipient: str
    payload: bytes


@dataclass(frozen=True)
class Reveal:
    """A survivor's own seed; shares of the seeds of survivors, and of the mask keys of those who vanished."""

    site: str
    seed: bytes
    seeds: Mapping[str, bytes] = field(default_factory=dict)
    keys: Mapping[str, bytes] = field(default_factory=dict)


def agreed(instance: Instance, survivors: Sequence[str], schema: str = "") -> bytes:
    """What a site signs when it is told who survived; ``schema`` says what lies where in its vector."""
    names = hashlib.sha256(json.dumps(sorted(survivors)).encode()).digest()
    return b"survivors\n" + instance.digest.hex().encode() + b"\n" + names.hex().encode() + b"\n" + schema.encode()


def context(instance: Instance, sender: str, recipient: str) -> str:
    """What a box is bound to."""
    return f"{instance.digest.hex()} {json.dumps([sender, recipient])}"


def seed_check(seed: bytes) -> bytes:
    """What is published of a seed, so that a wrong share of it is found out."""
    return hashlib.sha256(b"fedpeft seed\n" + seed).digest()
