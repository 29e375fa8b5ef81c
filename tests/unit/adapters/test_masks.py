"""Positions of sparse deltas from samples: the right ones, the same everywhere, and a base left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.adapters.starts import STARTS, Samples, make_start
from fedpeft.bases import Base, HeadSpec
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.methods.own.positions import modules
from fedpeft.tasks import TASKS

Warm = Callable[..., Base]
LABELS, LM = HeadSpec("classification", ("a", "b", "c")), HeadSpec("lm")
ROWS = [{"text": " ".join(f"w{(7 * row + 3 * place) % 60}" for place in range(2 + row % 5)), "label": "abc"[row % 3]} for row in range(12)]
STARTED = [("fisher", "sparse-fisher", "none"), ("fisher", "sparse-fisher", "nf4"), ("lottery", "sparse-lottery", "none")]


def method(kind: str) -> Any:
    return build(METHODS, {"kind": kind, "density": 0.01, "targets": ["attention"]}, "method")


def samples_of(base: Base, rows: list[dict[str, str]] = ROWS) -> Samples:
    task = build(TASKS, {"kind": "classification", "name": "t", "labels": ["a", "b", "c"]}, "task")
    return Samples(task, task.encode(rows, base), 5)


def chosen(adapter: Adapter, module: str) -> set[tuple[int, int]]:
    index = adapter.tensors.named()[f"base_model.model.{module}.sparse.index"].astype(int)
    return {(int(row), int(column)) for row, column in index.T}


@pytest.mark.parametrize(("start", "kind", "quantization"), STARTED)
def test_round_0_holds_positions_of_the_samples_and_the_base_is_as_before(warm: Warm, start: str, kind: str, quantization: str) -> None:
    base = warm("encoder", quantization)
    spec = make_spec("t", base, method(kind), LABELS)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    table = {"kind": start} | ({"steps": 3} if start == "lottery" else {})
    one, two = (make_start(table, base, spec, 3, samples_of(base)) for _ in range(2))
    assert one.digest == two.digest
    assert one.digest != initial(base, spec, 3).digest
    assert not one.tensors.pick({"delta"}).flat.any()
    assert np.array_equal(one.tensors.pick({"head"}).flat, initial(base, spec, 3).tensors.pick({"head"}).flat)
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in base.model.named_parameters())
    assert base.holder is None


def test_fisher_is_the_sum_over_examples_of_squared_gradients(warm: Warm) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, method("sparse-fisher"), LABELS)
    samples = samples_of(base)
    adapter = make_start("fisher", base, spec, 3, samples)
    first = initial(base, spec, 3)
    with attach(base, spec) as live:
        live.load(first.tensors)
        live.model.eval()
        name = modules(spec.layout)[1]
        weight = live.model.get_submodule(name).weight.requires_grad_(True)
        losses = [samples.task.loss(live.model, batch).total for batch in samples.task.batches(samples.data, 1, 0, 0)]
        score = sum(torch.autograd.grad(loss, weight)[0].double().square() for loss in losses).numpy()
        weight.requires_grad_(False)
    assert len(losses) == len(ROWS)
    want = np.argsort(-score, axis=None)[: len(chosen(adapter, name))]
    assert chosen(adapter, name) == {(int(row), int(column)) for row, column in zip(*np.unravel_index(want, score.shape), strict=True)}


def test_a_language_model_counts_its_examples_one_by_one(warm: Warm) -> None:
    base = warm("causal")
    task = build(TASKS, {"kind": "generation", "name": "t"}, "task")
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n + 2} w{n + 3}"} for n in range(4)]
    spec = make_spec("t", base, method("sparse-fisher"), LM)
    several = [make_start("fisher", base, spec, 0, Samples(task, task.encode(rows, base), size)) for size in (1, 4)]
    assert several[0].digest == several[1].digest


def test_what_cannot_be_placed_is_refused(warm: Warm) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, method("sparse-fisher"), LABELS)
    with pytest.raises(AdapterError, match=r"needs rows that the coordinator may see.*sparse-magnitude"):
        make_start("fisher", base, spec, 0)
    with pytest.raises(AdapterError, match="sparse-seed has no positions to place; use sparse-fisher"):
        make_start("lottery", base, make_spec("t", base, method("sparse-seed"), LABELS), 0, samples_of(base))
    small = warm("encoder", "nf4")
    with pytest.raises(AdapterError, match=r"is quantized and cannot be trained.*sparse-fisher"):
        make_start("lottery", small, make_spec("t", small, method("sparse-lottery"), LABELS), 0, samples_of(small))
    assert small.holder is None
    assert {"fisher", "lottery"} <= set(STARTS)
