"""Sparse deltas: where they lie, what they compute, and how the coordinator places them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpeft.errors import AdapterError
from fedpeft.methods.own import OWN
from fedpeft.methods.own import deltas as live_deltas
from fedpeft.methods.own.deltas import sparse_product, weight_of
from fedpeft.methods.own.positions import count, place, spread
from fedpeft.methods.own.scores import largest_changes, squared_gradients
from fedpeft.methods.targets import linear_roles
from fedpeft.schemes.alternating import Alternating
from fedpeft.schemes.base import Phase
from fedpeft.schemes.fedavg import FedAvg
from fedpeft.schemes.ffa import FFA
from fedpeft.tensors import Entry, Layout, Tensors

ROOT = "base_model.model."


def sparse(k, shape, seed):
    rng = np.random.default_rng(seed)
    flat = np.sort(rng.choice(shape[0] * shape[1], k, replace=False))
    return torch.from_numpy(np.stack(np.divmod(flat, shape[1]))), torch.from_numpy(rng.standard_normal(k))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_the_product_and_its_gradients_are_those_of_the_dense_delta(out, width, data):
    index, values = sparse(data.draw(st.integers(1, out * width)), (out, width), data.draw(st.integers(0, 99)))
    x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(out, width, dtype=torch.float64).index_put(tuple(index), values)
    assert torch.allclose(sparse_product(x, values, index, out), x @ dense.t())
    assert torch.autograd.gradcheck(lambda a, v: sparse_product(a, v, index, out), (x, values.requires_grad_()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over the examples here
def test_gradients_per_example():
    index, values = sparse(6, (4, 5), 0)
    x = torch.randn(7, 5, dtype=torch.float64)

    def loss(v, row):
        return sparse_product(row[None], v, index, 4).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    assert torch.allclose(each, torch.stack([torch.func.grad(loss)(values, row) for row in x]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 400), st.data())
def test_drawn_positions_are_different_and_in_range(seed, size, data):
    k = data.draw(st.integers(1, size))
    found = spread(seed, k, size)
    assert len(set(found.tolist())) == k
    assert found.min() >= 0
    assert found.max() < size
    assert np.array_equal(found, spread(seed, k, size))


def test_drawn_positions_never_change():
    assert spread(7, 5, 10**6).tolist() == [348043, 560901, 733314, 826786, 938325]
    assert count(1000, 0.005) == 5
    assert count(10, 0.005) == 1


def test_seeded_positions_need_neither_weights_nor_a_tensor_that_travels(make, head_of):
    places = []
    for seed, model in ((0, make("bert")), (0, make("roberta")), (1, make("bert"))):
        live = OWN["sparse-seed"](seed=seed).attach(model, head_of("bert"))
        layer = live.base_model.encoder.layer[0].attention.self.query
        hook = next(iter(layer._forward_hooks.values()))
        places.append(hook.args[0]["index"])
        assert {role for role, _ in OWN["sparse-seed"]().entries(live).values()} == {"delta", "head"}
    assert not torch.equal(places[0], places[2])


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_magnitude_takes_the_largest_entries_out_by_in(model, make, head_of):
    base = make(model)
    dense = {name: weight_of(base.get_submodule(name)).numpy() for name in linear_roles(base)}
    method = OWN["sparse-magnitude"](density=0.02)
    entries = method.entries(method.attach(base, head_of(model)))
    for name, weight in dense.items():
        index = entries[f"{ROOT}{name}.sparse.index"][1]
        chosen = {tuple(place) for place in index.t().int().tolist()}
        largest = np.argsort(-np.abs(weight), axis=None)[: count(weight.size, 0.02)]
        assert chosen == set(zip(*(part.tolist() for part in np.unravel_index(largest, weight.shape)), strict=True))
        assert not index.requires_grad


@pytest.mark.filterwarnings("ignore")
def test_positions_and_scores_on_a_four_bit_base(make, head_of, rows):
    import bitsandbytes as bnb

    model = make("bert")
    layer = model.bert.encoder.layer[0].intermediate
    small = bnb.nn.Linear4bit(32, 64, compute_dtype=torch.float32, quant_type="nf4")
    small.support_avx512bf16_for_cpu = False
    small.load_state_dict(layer.dense.state_dict())
    layer.dense = small.to("cpu")
    scores = squared_gradients(model, ("all",), (model(**rows).logits.sum() for _ in range(1)))
    assert scores["bert.encoder.layer.0.intermediate.dense"].shape == (64, 32)
    assert scores["bert.encoder.layer.0.intermediate.dense"].any()
    with pytest.raises(AdapterError, match=r"intermediate.dense is quantized.*sparse-fisher"):
        largest_changes(model, ("mlp",), lambda weights: None)
    method = OWN["sparse-magnitude"](density=0.01)
    entries = method.entries(method.attach(model, head_of("bert")))
    index = entries[f"{ROOT}bert.encoder.layer.0.intermediate.dense.sparse.index"][1].long()
    dense = weight_of(small)
    assert dense.shape == (64, 32)
    assert dense[tuple(index)].abs().min() >= dense.abs().flatten().topk(index.shape[1] + 1).values[-1]


def test_squared_gradients_are_per_example(make, head_of, rows):
    model = make("gpt2").requires_grad_(False)
    ids = rows["input_ids"][:, :4]

    def losses(batches):
        return (nn.functional.cross_entropy(model(b).logits[:, :-1].flatten(0, 1), b[:, 1:].flatten(), reduction="sum") for b in batches)

    scores = squared_gradients(model, ("attention",), losses([ids]))
    name = "transformer.h.1.attn.c_attn"
    weight = model.get_submodule(name).weight.requires_grad_(True)
    want = sum(torch.autograd.grad(loss, weight)[0].square() for loss in losses([ids[:1], ids[1:]]))
    assert np.allclose(scores[name], want.t().numpy(), rtol=1e-4, atol=1e-7)
    assert set(scores) == {n for n, role in linear_roles(model).items() if role == "attention"}
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(AdapterError, match="at least one loss"):
        squared_gradients(model, ("attention",), [])


def test_a_first_training_finds_what_it_moves_and_leaves_the_base(make, head_of):
    model = make("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fit(weights):
        with torch.no_grad():
            for weight in weights:
                weight[1, 2] += 3.0
                weight[0] -= 0.5

    scores = largest_changes(model, ("mlp",), fit)
    assert all(torch.equal(before[name], p) and not (p.requires_grad and "mlp" in name) for name, p in model.named_parameters())
    for found in scores.values():
        assert np.unravel_index(found.argmax(), found.shape) == (1, 2)
        assert np.allclose(found[0], 0.5, atol=1e-6)
        assert not found[2:].any()


def test_scores_place_the_positions(make, head_of):
    method = OWN["sparse-fisher"](density=0.02)
    live = method.attach(make("bert"), head_of("bert"))
    entries = method.entries(live)
    layout = Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in entries.items()])
    rng = np.random.default_rng(0)
    start = Tensors(layout, rng.standard_normal(layout.size).astype(np.float32))
    scores = {name: rng.random(tuple(weight_of(live.get_submodule(name)).shape)) for name in linear_roles(live)}
    placed = place(start, scores)
    assert not placed.pick({"delta"}).flat.any()
    assert np.array_equal(placed.pick({"head"}).flat, start.pick({"head"}).flat)
    for name, score in scores.items():
        chosen = placed.named()[f"{ROOT}{name}.sparse.index"].astype(int)
        threshold = np.sort(score, axis=None)[-chosen.shape[1]]
        assert score[tuple(chosen)].min() >= threshold
        assert len({tuple(pair) for pair in chosen.T.tolist()}) == chosen.shape[1]
    name = next(iter(scores))
    for wrong in ({}, scores | {name: scores[name] * np.nan}, scores | {name: np.ones(3)}):
        with pytest.raises(AdapterError, match=f"sparse: {name if wrong else ''}.*needs finite scores"):
            place(start, wrong)
    with pytest.raises(AdapterError, match="no positions to place"):
        place(start.pick({"delta"}), scores)


def test_layers_too_wide_for_exact_positions_are_refused(make, head_of, monkeypatch):
    monkeypatch.setattr(live_deltas, "LARGEST", 63)
    with pytest.raises(AdapterError, match="64 rows or columns, positions are exact up to 63"):
        OWN["sparse-magnitude"]().attach(make("bert"), head_of("bert"))
    assert np.float32(2**24 - 1) == 2**24 - 1 != np.float32(2**24 + 1)


@pytest.mark.parametrize("scheme", [FedAvg(), FFA(), Alternating()], ids=lambda scheme: scheme.kind)
def test_no_phase_moves_positions(scheme):
    layout = Layout.of([Entry("delta", "x.sparse.delta", (3,)), Entry("index", "x.sparse.index", (2, 3))])
    for round in (1, 2):
        phase = scheme.phase(round, layout)
        assert phase.moves == phase.trains == {"delta"}
        assert scheme.travels(layout, phase).roles == {"delta"}
    assert scheme.exact(layout)
    assert Phase("x", frozenset({"index"}), frozenset({"index", "a"}), frozenset({"index", "b"})).moves == {"b"}
