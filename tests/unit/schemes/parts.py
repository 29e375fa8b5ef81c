"""Random parts of sums, and their products computed densely, for the tests of robust rules."""

import numpy as np
from hypothesis import strategies as st

from fedpeft.schemes import FedAvg, Part, Phase
from fedpeft.schemes.robust.coordinates import COLUMNS
from fedpeft.tensors import Entry, Layout

WIDE = Layout.of([Entry("bias", "wide.bias", (2 * COLUMNS + 77,)), Entry("head", "head.weight", (3, 5))])
BOTH = Phase("all", frozenset({"A", "B", "head", "bias"}))
CORE = Phase("R", frozenset({"R", "head", "bias"}))
SEEDS = st.integers(0, 2**32 - 1)


def drawn(layout, phase, count, draw, seed=0, scale=0.3):
    """A current adapter and the parts of ``count`` sites in ``phase``."""
    rng = np.random.default_rng(seed)
    current = draw(layout, rng)
    own = layout.subset(phase.roles)
    return current, [Part(float(rng.uniform(0.2, 1.0)), draw(own, rng, scale)) for _ in range(count)]


def changes(current, phase, part, scale=1.0):
    """What a part changes, formed densely in float64: every product of factors, then all other travelling values."""
    layout = current.layout
    before = {name: value.astype(np.float64) for name, value in current.named().items()}
    after = {name: value + scale * part.named().get(name, np.zeros(1)).astype(np.float64) for name, value in before.items()}

    def products(named):
        for entry in layout.entries:
            if entry.role == "A":
                b, core = named[entry.name.replace("_A", "_B")], named.get(entry.name.replace("_A", "_R"))
                yield b @ (core if core is not None else np.eye(b.shape[1])) @ named[entry.name]

    factors = {"A", "B", "R"} if "A" in layout.roles else set()
    dense = [(new - old).ravel() for new, old in zip(products(after), products(before), strict=True)]
    return np.concatenate([*dense, (part.pick(phase.roles - factors).flat * np.float64(scale)).ravel()])


def dense(current, phase, parts, scale=1.0):
    return np.stack([changes(current, phase, part.values, scale) for part in parts])


def apart(table):
    return np.square(table[:, None] - table[None, :]).sum(axis=2)


def krum_order(squared, f):
    """Krum by loops: the sum of the n - f - 2 smallest distances to others."""
    scores = []
    for i in range(len(squared)):
        others = sorted(squared[i][j] for j in range(len(squared)) if j != i)
        scores.append(sum(others[: max(len(squared) - f - 2, 1)]))
    return sorted(range(len(squared)), key=lambda i: (scores[i], sum(squared[i])))


PHASES = [
    ("lora", FedAvg().phase(1, Layout.of([Entry("A", "a", (1, 1)), Entry("B", "b", (1, 1))]))),
    ("lora", Phase("B", frozenset({"B", "head", "bias"}))),
    ("lora", Phase("A", frozenset({"A", "head", "bias"}))),
    ("lora", BOTH),
    ("dora", Phase("B", frozenset({"B", "M", "head", "bias"}))),
    ("core", CORE),
    ("core", Phase("B", frozenset({"B", "head", "bias"}))),
    ("core", Phase("A", frozenset({"A", "head", "bias"}))),
    ("ia3", Phase("all", frozenset({"scale", "head", "bias"}))),
    ("bottleneck", Phase("all", frozenset({"down", "up"}))),
]
