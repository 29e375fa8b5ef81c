"""Small adapters of two tasks and an empty registry."""

import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases.spec import HeadSpec
from fedpeft.methods import METHODS
from fedpeft.registry import Registry
from fedpeft.tensors import Entry, Layout, Tensors

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="session")
def make_adapter():
    """``make_adapter(seed, task)``: a LoRA adapter with random values."""
    layout = Layout.of(
        [
            Entry("A", f"{QUERY}.lora_A.weight", (2, 6)),
            Entry("B", f"{QUERY}.lora_B.weight", (6, 2)),
            Entry("head", "base_model.model.classifier.weight", (3, 6)),
        ]
    )

    def make(seed, task="area"):
        head = HeadSpec("classification", ("x", "y", "z"))
        spec = AdapterSpec(task, "f" * 64, "minilm", METHODS["lora"](r=2, alpha=2.0), head, layout)
        return Adapter(spec, Tensors(layout, np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)))

    return make


@pytest.fixture
def registry(tmp_path):
    """An empty registry."""
    return Registry(tmp_path / "registry")
