"""Sites with identities, and whole protocol runs in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest

from fedpeft.privacy.secagg import PURPOSE, Collector, Instance, Member
from fedpeft.signing import Keys


@dataclass
class Play:
    """One instance with every member's machine; ``lost`` names who vanishes before which step."""

    instance: Instance
    keys: dict[str, Keys]
    members: dict[str, Member]
    collector: Collector
    lost: dict[str, str] = field(default_factory=dict)

    @cached_property
    def pins(self) -> dict[str, str]:
        return {name: keys.public() for name, keys in self.keys.items()}

    def alive(self, step: str) -> list[str]:
        steps = ("bundle", "deal", "mask", "agree", "reveal")
        return [name for name in self.members if steps.index(self.lost.get(name, "reveal")) > steps.index(step) or name not in self.lost]

    def keyed(self) -> None:
        for name in self.alive("bundle"):
            self.collector.add_bundle(self.members[name].bundle(self.keys[name]))

    def dealt(self) -> None:
        for name in self.alive("deal"):
            self.collector.add_boxes(name, self.members[name].deal(self.collector.bundles_for(name), self.pins))

    def masked(self, vectors: dict[str, np.ndarray]) -> None:
        for name in self.alive("mask"):
            member = self.members[name]
            self.collector.add_vector(name, member.mask(vectors[name], self.collector.boxes_for(name), self.collector.dealers))

    def agreed(self) -> None:
        for name in self.alive("agree"):
            self.collector.add_agreement(name, self.members[name].agree(self.collector.survivors, self.keys[name]))

    def revealed(self) -> None:
        for name in self.alive("reveal"):
            self.collector.add_reveal(self.members[name].reveal(self.collector.signatures_for(name), self.pins))

    def run(self, vectors: dict[str, np.ndarray]) -> np.ndarray:
        self.keyed()
        self.dealt()
        self.masked(vectors)
        self.agreed()
        self.revealed()
        return self.collector.result()


@pytest.fixture(scope="session")
def identities(tmp_path_factory) -> Callable[[int], dict[str, Keys]]:
    """The first ``count`` sites' identity keys, made once."""
    folder = tmp_path_factory.mktemp("identities")
    made: dict[str, Keys] = {}

    def get(count: int) -> dict[str, Keys]:
        for number in range(len(made), count):
            name = f"site{number:03d}"
            made[name] = Keys(folder / name, PURPOSE)
            made[name].public()
        return dict(list(made.items())[:count])

    return get


@pytest.fixture(scope="session")
def play(identities) -> Callable[..., Play]:
    """``play(count, lost, **settings)``: a fresh run."""

    def make(count: int, lost: dict[str, str] | None = None, **settings) -> Play:
        keys = identities(count)
        instance = Instance("run/1/0/task/train", tuple(keys), **settings)
        return Play(instance, keys, {name: Member(instance, name) for name in keys}, Collector(instance), lost or {})

    return make
