from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.bases import embed as module
from fedpeft.errors import BaseError

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module", params=["bert", "llama"])
def base(request: pytest.FixtureRequest, tiny_model: Tiny) -> Base:
    return load_base(BaseSpec(str(tiny_model(request.param)), max_tokens=12), "cpu")


def oracle(base: Base, text: str) -> np.ndarray:
    """One text at a time, no padding, float64 mean."""
    ids = base.tokenizer(text)["input_ids"][:12] or [base.tokenizer.pad_token_id]
    with torch.no_grad():
        hidden = base.trunk(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
    mean = hidden.mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


texts = st.lists(st.lists(st.sampled_from([f"w{i}" for i in range(20)]), max_size=16).map(" ".join), max_size=9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=texts, budget=st.integers(1, 60))
def test_equals_the_slow_mean_in_the_order_given(base: Base, rows: list[str], budget: int) -> None:
    kept, module.BATCH_TOKENS = module.BATCH_TOKENS, budget
    try:
        found = base.embed(rows)
    finally:
        module.BATCH_TOKENS = kept
    assert found.shape == (len(rows), 64)
    assert found.dtype == np.float32
    for row, text in zip(found, rows, strict=True):
        np.testing.assert_allclose(row, oracle(base, text), atol=2e-6)


def test_gradients_mode_and_training_flag_are_as_before(base: Base) -> None:
    for flag in (True, False):
        base.trunk.train(flag)
        base.embed(["w1 w2"])
        assert base.trunk.training is flag
    assert torch.is_grad_enabled()


def test_an_attached_adapter_is_refused(base: Base) -> None:
    base.holder = "mail"
    try:
        with pytest.raises(BaseError, match="carries the adapter of task 'mail'"):
            base.embed(["w1"])
    finally:
        base.holder = None


def test_minilm_puts_like_with_like() -> None:
    rows = load_base(BaseSpec("minilm"), "cpu").embed(["A man eats pasta.", "Someone is having a meal.", "The stock market fell today."])
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2
