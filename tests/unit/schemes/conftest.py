"""Layouts of every method class, and random cohorts on them."""

import numpy as np
import pytest

from fedpeft.tensors import Entry, Layout, Tensors

OUT, INNER, RANK = 5, 6, 3
FACTORS = [Entry("A", "q.lora_A.weight", (RANK, INNER)), Entry("B", "q.lora_B.weight", (OUT, RANK))]
EXTRA = [
    Entry("A2", "q.lora_A2.weight", (4, INNER)),
    Entry("B2", "q.lora_B2.weight", (OUT, 4)),
    Entry("A2", "v.lora_A2.weight", (4, INNER)),
    Entry("B2", "v.lora_B2.weight", (OUT, 4)),
]
SECOND = [Entry("A", "v.lora_A.weight", (2, INNER)), Entry("B", "v.lora_B.weight", (OUT, 2))]
HEAD = [Entry("head", "classifier.weight", (2, OUT)), Entry("bias", "classifier.bias", (2,))]


@pytest.fixture(scope="session")
def layouts():
    """Layouts by method class."""
    return {
        "lora": Layout.of(FACTORS + SECOND + HEAD),
        "double": Layout.of(FACTORS + SECOND + EXTRA + HEAD),
        "core": Layout.of([*FACTORS, Entry("R", "q.lora_R.weight", (RANK, RANK)), *HEAD]),
        "road": Layout.of([Entry("theta", "k.road_theta", (OUT,)), Entry("alpha", "k.road_alpha", (OUT,)), *HEAD]),
        "dora": Layout.of([*FACTORS, Entry("M", "q.lora_magnitude_vector.weight", (OUT,)), *HEAD]),
        "ia3": Layout.of([Entry("scale", "k.ia3_l", (1, INNER)), *HEAD]),
        "bitfit": Layout.of([Entry("bias", "q.bias", (OUT,)), *HEAD[:1]]),
        "prompt": Layout.of([Entry("prompt", "prompt_embeddings", (4, OUT))]),
        "bottleneck": Layout.of([Entry("down", "down.weight", (2, OUT)), Entry("up", "up.weight", (OUT, 2))]),
    }


@pytest.fixture(scope="session")
def averaged():
    """``averaged(contributions, shares)``: their weighted mean, summed in float64."""

    def mean(moves, shares):
        return Tensors(moves[0].layout, sum(p * m.flat.astype(np.float64) for p, m in zip(shares, moves, strict=True)).astype(np.float32))

    return mean


@pytest.fixture(scope="session")
def square():
    """One layout per call: ``square(m, n, r, modules, extra)``, LoRA's factors of equal modules."""

    def make(m, n, r, modules=1, extra=0):
        names = [f"layer.{i}" for i in range(modules)]
        ranks = {"": r, "2": extra} if extra else {"": r}
        left = [Entry(f"B{tag}", f"{name}.lora_B{tag}.weight", (m, rank)) for name in names for tag, rank in ranks.items()]
        right = [Entry(f"A{tag}", f"{name}.lora_A{tag}.weight", (rank, n)) for name in names for tag, rank in ranks.items()]
        return Layout.of(left + right)

    return make


@pytest.fixture(scope="session")
def draw():
    """``draw(layout, rng, scale)``: random tensors."""

    def make(layout, rng, scale=1.0):
        return Tensors(layout, (rng.standard_normal(layout.size) * scale).astype(np.float32))

    return make


@pytest.fixture(scope="session")
def product():
    """``product(tensors, module)``: B A in float64."""

    def multiply(tensors, module="q"):
        named = tensors.named()
        return named[f"{module}.lora_B.weight"].astype(np.float64) @ named[f"{module}.lora_A.weight"].astype(np.float64)

    return multiply
