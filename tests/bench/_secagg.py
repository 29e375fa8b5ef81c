"""What the benches of secure aggregation share: cohorts of our machines, and flwr's SecAgg+ functions fed with the same values."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np

from fedpeft.privacy.secagg import PURPOSE, Codes, Collector, Instance, Member
from fedpeft.signing import Keys
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update

STEPS = ("bundle", "deal", "mask", "agree", "reveal")
CLIP, TARGET, RING, MOST, EXAMPLES = 8.0, 1 << 22, 1 << 32, 1000.0, 500


@dataclass
class Cohort:
    """All machines of one masked sum; ``lost`` names who vanishes before which step. CPU seconds by side in ``spent``."""

    instance: Instance
    keys: dict[str, Keys]
    lost: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: {"sites": 0.0, "coordinator": 0.0})
    items: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("bundles", "boxes", "vectors", "names", "signatures", "shares"), 0)
    )
    """What was handed over, up and down, by kind."""

    def __post_init__(self) -> None:
        self.members = {name: Member(self.instance, name) for name in self.keys}
        self.pins = {name: keys.public() for name, keys in self.keys.items()}
        self.collector = Collector(self.instance)

    def alive(self, step: str) -> list[str]:
        """Who takes part in ``step``."""
        steps = {name: STEPS.index(lost) for name, lost in self.lost.items()}
        return [name for name in self.members if STEPS.index(step) < steps.get(name, len(STEPS))]

    def prepare(self) -> None:
        """Keys and shares: what comes before the vectors."""
        for name in self.alive("bundle"):
            bundle = self._site(lambda name=name: self.members[name].bundle(self.keys[name]))
            self._coordinator(lambda bundle=bundle: self.collector.add_bundle(bundle))
        for name in self.alive("deal"):
            bundles = self._coordinator(lambda name=name: self.collector.bundles_for(name))
            boxes = self._site(lambda name=name, bundles=bundles: self.members[name].deal(bundles, self.pins))
            self._coordinator(lambda name=name, boxes=boxes: self.collector.add_boxes(name, boxes))
            self._count(bundles=1 + len(bundles), boxes=len(boxes))

    def deliver(self, codes: Callable[[str], Codes]) -> None:
        """Vectors under masks."""
        for name in self.alive("mask"):
            boxes, dealers = self._coordinator(lambda name=name: (self.collector.boxes_for(name), self.collector.dealers))
            masked = self._site(lambda name=name, boxes=boxes, dealers=dealers: self.members[name].mask(codes(name), boxes, dealers))
            self._coordinator(lambda name=name, masked=masked: self.collector.add_vector(name, masked))
            self._count(boxes=len(boxes), vectors=1, names=len(dealers))

    def open(self) -> Codes:
        """Survivors, signatures, shares, and the sum."""
        for name in self.alive("agree"):
            survivors = self._coordinator(lambda: self.collector.survivors)
            mark = self._site(lambda name=name, survivors=survivors: self.members[name].agree(survivors, self.keys[name]))
            self._coordinator(lambda name=name, mark=mark: self.collector.add_agreement(name, mark))
            self._count(names=len(survivors), signatures=1)
        for name in self.alive("reveal"):
            marks = self._coordinator(lambda name=name: self.collector.signatures_for(name))
            reveal = self._site(lambda name=name, marks=marks: self.members[name].reveal(marks, self.pins))
            self._coordinator(lambda reveal=reveal: self.collector.add_reveal(reveal))
            self._count(signatures=len(marks), shares=len(reveal.seeds) + len(reveal.keys))
        return self._coordinator(self.collector.result)

    def _count(self, **items: int) -> None:
        for kind, count in items.items():
            self.items[kind] += count

    def _site(self, work: Callable[[], Any]) -> Any:
        return self._timed("sites", work)

    def _coordinator(self, work: Callable[[], Any]) -> Any:
        return self._timed("coordinator", work)

    def _timed(self, side: str, work: Callable[[], Any]) -> Any:
        began = process_time()
        answer = work()
        self.spent[side] += process_time() - began
        return answer


@contextmanager
def identities(count: int) -> Iterator[dict[str, Keys]]:
    """Signing keys of ``count`` sites, for as long as the block lasts."""
    with TemporaryDirectory() as folder:
        found = {f"site{number:04}": Keys(Path(folder) / str(number), PURPOSE) for number in range(count)}
        for keys in found.values():
            keys.public()
        yield found


def leaving(names: list[str], share: int, steps: tuple[str, ...] = STEPS) -> dict[str, str]:
    """One of ``share`` sites vanishes, each before the next of ``steps`` in turn."""
    gone = random.Random(0).sample(names, len(names) // share)
    return {name: steps[place % len(steps)] for place, name in enumerate(gone)}


def values(size: int, count: int) -> list[np.ndarray]:
    """``count`` vectors of float32 (size,), as deltas look."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) * np.float32(1e-2) for _ in range(count)]


def coder(size: int, sites: int) -> Callable[[np.ndarray], Codes]:
    """Our quantisation of one site's values to codes, for a cohort of ``sites``."""
    layout, grid = Layout.of([Entry("B", "b", (size,))]), Grid(sites)
    return lambda delta: Update.encode(Tensors(layout, delta), 0.5, {}, grid).codes


def flwr_sites(count: int, threshold: int) -> tuple[dict[int, Any], dict[int, tuple[bytes, bytes]]]:
    """flwr's client states after its stage 0, numbered from 1, and their public keys."""
    from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState, _setup
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    settings = {
        Key.SAMPLE_NUMBER: count, Key.SHARE_NUMBER: count, Key.THRESHOLD: threshold, Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: TARGET, Key.MOD_RANGE: RING, Key.MAX_WEIGHT: MOST,
    }  # fmt: skip
    states, keys = {}, {}
    for number in range(1, count + 1):
        states[number] = SecAggPlusState()
        states[number].nid = number
        answer = _setup(states[number], dict(settings))
        keys[number] = (answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2])
    return states, keys


def flwr_mask(state: Any, boxes: tuple[list[bytes], list[int]], delta: np.ndarray) -> list[bytes]:
    """flwr's stage 2 of one client: quantise and mask."""
    from flwr.client.mod.secure_aggregation.secaggplus_mod import _collect_masked_vectors
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    asked = {Key.CIPHERTEXT_LIST: boxes[0], Key.SOURCE_LIST: boxes[1]}
    return _collect_masked_vectors(state, asked, EXAMPLES, ndarrays_to_parameters([delta]))[Key.MASKED_PARAMETERS]


def flwr_boxes(states: dict[int, Any], keys: dict[int, tuple[bytes, bytes]], number: int) -> tuple[list[bytes], list[int]]:
    """Boxes for client ``number`` with random shares in them: its stage 2 opens them and does not look at what is inside."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

    state, boxes = states[number], []
    state.public_keys_dict, state.rd_seed = keys, os.urandom(32)
    others = [other for other in states if other != number]
    for other in others:
        key = generate_shared_key(bytes_to_private_key(state.sk2), bytes_to_public_key(keys[other][1]))
        state.ss2_dict[other] = key
        boxes.append(encrypt(key, share_keys_plaintext_concat(other, number, os.urandom(36), os.urandom(324))))
    return boxes, others
