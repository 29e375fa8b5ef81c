"""Every method, live on every quantization that its facts name: it learns there, and the base is as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import Base, HeadSpec
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.spec import EVERY_BASE

SETTINGS: dict[str, dict[str, Any]] = {"trainable-tokens": {"tokens": [10, 11]}}
ENCODERS = {"attempt"}
"""What takes no causal base."""
KINDS = sorted(set(METHODS) - {"vpt"})

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("quantization", sorted(EVERY_BASE))
@pytest.mark.parametrize("kind", KINDS)
def test_learns_on_the_bases_that_its_facts_name(warm: Callable[..., Base], inputs: dict[str, Any], kind: str, quantization: str) -> None:
    encoder = kind in ENCODERS
    base = warm("encoder" if encoder else "causal", quantization)
    head = HeadSpec("classification", ("a", "b", "c")) if encoder else HeadSpec("lm")
    labels = torch.tensor([0, 2]) if encoder else inputs["input_ids"]
    method, facts = build(METHODS, {"kind": kind, **SETTINGS.get(kind, {})}, "method"), SPECS[kind]
    if quantization not in facts.bases:
        with pytest.raises(AdapterError, match=f"{kind}: does not train on a base"):
            make_spec("t", base, method, head)
        return
    with torch.no_grad():
        base.trunk(**inputs)  # int8 settles its state at the first forward
        before = base.trunk(**inputs).last_hidden_state
    spec = make_spec("t", base, method, head)
    start = initial(base, spec, 1).tensors
    with attach(base, spec) as live:
        live.load(start)
        losses = []
        optimizer = torch.optim.AdamW([torch.nn.Parameter(live.flat)], lr=facts.learning_rate)
        optimizer.param_groups[0]["params"][0].grad = live.grad
        live.model.train()
        for _ in range(4):
            torch.manual_seed(0)
            live.grad.zero_()
            loss = live.model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        moved = live.read().flat != start.flat
    assert losses[-1] < losses[0]
    assert moved.any()
    with torch.no_grad():
        assert torch.equal(base.trunk(**inputs).last_hidden_state, before)
