"""One small mechanism: its layout, counters, deltas and sums."""

from __future__ import annotations

import numpy as np

from fedpeft.privacy.mechanism import Bounded, Mechanism, protect
from fedpeft.privacy.noise import SecureNoise
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Update

NOISE = SecureNoise()
LAYOUT = Layout.of([Entry("B", "q.lora_B", (40, 4)), Entry("head", "score.weight", (3, 40))])
COUNTERS = {"train.loss": Bounded(2, 50.0), "train.seen": Bounded(1, 1000.0)}
SEEN = {"train.loss": (10.0, 20.0), "train.seen": (500.0,), "train.tokens": (1e9,)}


def delta(size: float, seed: int = 0, layout: Layout = LAYOUT) -> Tensors:
    flat = np.random.default_rng(seed).normal(size=layout.size)
    return Tensors(layout, (flat * size / max(np.linalg.norm(flat), 1e-30)).astype(np.float32))


def total(mechanism: Mechanism, sites: int, size: float = 1.0, layout: Layout = LAYOUT) -> Update:
    updates = [protect(delta(size, site, layout), SEEN, mechanism, NOISE) for site in range(sites)]
    return sum(updates[1:], start=updates[0])


MODES = [
    {},
    {"side": 0.1, "counters": COUNTERS},
    {"side": 0.1, "adaptive": True},
    {"side": 0.3, "counters": COUNTERS, "adaptive": True},
]
