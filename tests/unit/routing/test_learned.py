"""A trained router in a card: what it says is the float64 loop's, and it is read back as it was written or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedpeft.bases.spec import LAST
from fedpeft.errors import AdapterError
from fedpeft.routing import Learned, Request, RouterCard, XLoraRouter
from fedpeft.routing.cardfile import HEAD


def drawn(seed: int, layers: int = 3, experts: int = 2, width: int = 4) -> Learned:
    rng = np.random.default_rng(seed)
    names = tuple(f"task{number}" for number in range(experts))
    return Learned(names, rng.normal(scale=3.0, size=(layers * experts, width + 1)).astype(np.float32))


@settings(max_examples=30)
@given(seed=st.integers(0, 99), layers=st.integers(1, 4), experts=st.integers(1, 5), tokens=st.integers(1, 6))
def test_a_route_is_the_loop_over_tokens_layers_and_experts(seed, layers, experts, tokens):
    learned = drawn(seed, layers, experts)
    states = np.random.default_rng(seed + 1).normal(size=(tokens, 4)).astype(np.float32)
    want = np.zeros(experts)
    for token in states.astype(np.float64):
        for layer in range(layers):
            rows = learned.table[layer * experts : (layer + 1) * experts].astype(np.float64)
            raised = [np.exp(row[:-1] @ token + row[-1]) for row in rows]
            want += np.array(raised) / sum(raised) / (layers * tokens)
    found = XLoraRouter(learned).route(Request(watch=lambda: {LAST: states}))
    assert list(found.weights) == list(learned.experts)
    assert np.allclose(list(found.weights.values()), want, atol=1e-5)
    assert found.score == max(found.weights.values())


def test_a_card_keeps_it_and_asks_for_the_last_hidden_state():
    card = RouterCard(learned=drawn(1))
    back = RouterCard.from_bytes(card.to_bytes())
    assert back.learned is not None
    assert back.learned.experts == ("task0", "task1")
    assert back.learned.table.tobytes() == card.learned.table.tobytes()
    assert back.to_bytes() == card.to_bytes()
    assert back.watched == (LAST,)
    assert RouterCard().watched == ()


@pytest.mark.parametrize("experts", [None, [], ["a", "a"], ["a", "b", "c", "d"], "ab"])
def test_a_card_whose_experts_do_not_fit_is_refused(experts):
    tensors = load(RouterCard(learned=drawn(1)).to_bytes())
    head = json.loads(tensors[HEAD].tobytes())
    text = json.dumps({**head, "experts": experts}).encode()
    with pytest.raises(AdapterError, match=r"router"):
        RouterCard.from_bytes(save({**tensors, HEAD: np.frombuffer(text, np.uint8)}))


def test_states_of_another_base_are_refused():
    with pytest.raises(AdapterError, match="reads 4 hidden values, not 7"):
        drawn(1).shares(np.zeros((2, 7), np.float32))
