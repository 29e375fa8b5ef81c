"""The low-rank part of a mixture against a loop over tokens and adapters in float64, for every way and every kind of gates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.mixtures.crowd import INTERPRETED
from torch import nn

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases import HeadSpec
from fedpeft.methods import Lora
from fedpeft.mixtures import Gates
from fedpeft.mixtures.compile import compiled, everyone
from fedpeft.mixtures.hosts import Family, Host
from fedpeft.mixtures.plans import pairs_of_rows
from fedpeft.mixtures.slabs import Store
from fedpeft.mixtures.state import State
from fedpeft.tensors import Entry, Layout, Tensors

WIDTH, OUT = 8, {"q": 6, "v": 10}
PATHS = ("auto", "loop", "batched", "segments", "grouped", *(["fused"] if INTERPRETED else []))


class Pair(nn.Module):
    """Two layers that read one input."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.q, self.v = nn.Linear(WIDTH, OUT["q"]), nn.Linear(WIDTH, OUT["v"], bias=False)
        self.requires_grad_(False)


def adapter(name, rank, seed, dropout=0.0):
    shapes = {"A": lambda out: (rank, WIDTH), "B": lambda out: (out, rank)}
    entries = [Entry(f, f"base_model.model.{m}.lora_{f}.weight", shapes[f](out)) for m, out in OUT.items() for f in "AB"]
    layout = Layout.of(entries)
    values = np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)
    return Adapter(
        AdapterSpec(name, "base", "model", Lora(r=rank, targets=("q", "v"), dropout=dropout), HeadSpec("lm"), layout),
        Tensors(layout, values),
    )


def forward(adapters, gates, x, way, *, dense=False, router=None):
    """Outputs of both layers under ``gates``, and the store with the gradients of their weighted sum."""
    model, store = Pair(), Store("cpu")
    state = State(store, way, dense)
    store.put(list(adapters.items()))
    family = Family()
    hosts = {name: Host(name, getattr(model, name), state, family) for name in OUT}
    for slab, row in store.place.values():
        for name, part in slab.parts.items() if dense else ():
            hosts[name].holder.put(slab, row, part.names)
    state.fixed, state.routed = compiled(gates, store, everyone(store, "(shared)") if "(shared)" in adapters else None)
    outs = {name: getattr(model, name)(x) for name in OUT}
    sum((out * weights_of(out)).sum() for out in outs.values()).backward()
    for host in hosts.values():
        host.release()
    assert all("forward" not in vars(getattr(model, name)) for name in OUT)
    return outs, store


def weights_of(out):
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)


def oracle(adapters, weights, x):
    """Token by token, adapter by adapter, in float64; ``weights`` (B, S, adapters)."""
    x = x.detach().double().requires_grad_()
    w = weights.detach().double().requires_grad_()
    model, flats = Pair().double(), {name: torch.from_numpy(a.tensors.flat).double().requires_grad_() for name, a in adapters.items()}
    total = 0.0
    outs = {}
    for name in OUT:
        rows = []
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                y = getattr(model, name)(x[b, s])
                for e, (key, a) in enumerate(adapters.items()):
                    spans = a.spec.layout.spans
                    down = flats[key][spans[f"base_model.model.{name}.lora_A.weight"]].view(-1, WIDTH)
                    up = flats[key][spans[f"base_model.model.{name}.lora_B.weight"]].view(OUT[name], -1)
                    y = y + w[b, s, e] * (up @ (down @ x[b, s]))
                rows.append(y)
        outs[name] = torch.stack(rows).view(*x.shape[:2], -1)
        total = total + (outs[name] * weights_of(outs[name])).sum()
    total.backward()
    return outs, {name: flat.grad for name, flat in flats.items()}, x.grad, w.grad


def close(found, wanted):
    wanted = torch.zeros(found.shape, dtype=torch.float64) if wanted is None else wanted
    scale = max(float(wanted.detach().abs().max()), 1.0)
    assert float((found.detach().double() - wanted.detach()).abs().max()) <= 1e-5 * scale


def check(adapters, gates, weights, x, way, **settings):
    """Outputs and all gradients; ``weights`` is what the gates say, spelled out."""
    outs, store = forward(adapters, gates, x, way, **settings)
    wanted, grads, grad_x, _ = oracle(adapters, weights, x)
    for name in OUT:
        close(outs[name], wanted[name])
    for name in adapters:
        slab, row = store.place[name]
        close(slab.grad(row), grads[name])
    close(x.grad, grad_x)


@st.composite
def setups(draw):
    ranks = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=5))
    adapters = {f"t{i}": adapter(f"t{i}", rank, i) for i, rank in enumerate(ranks)}
    if draw(st.booleans()):
        adapters["(shared)"] = adapter("(shared)", draw(st.sampled_from([2, 3])), 99)
    rows, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return adapters, torch.randn(rows, tokens, WIDTH, generator=generator).requires_grad_(), generator


def named(adapters):
    return [name for name in adapters if name != "(shared)"]


def spelled(adapters, x):
    weights = torch.zeros(*x.shape[:2], len(adapters))
    if "(shared)" in adapters:
        weights[..., list(adapters).index("(shared)")] = 1
    return weights


@settings(max_examples=25)
@given(setups(), st.sampled_from(PATHS), st.booleans(), st.data())
def test_one_adapter_per_row_is_the_loop(setup, way, dense, data):
    adapters, x, _ = setup
    picks = [data.draw(st.sampled_from([None, *named(adapters)])) for _ in range(len(x))]
    weights = spelled(adapters, x)
    for row, pick in enumerate(picks):
        if pick is not None:
            weights[row, :, list(adapters).index(pick)] += 1
    check(adapters, Gates.rows(picks), weights, x, way, dense=dense)


@settings(max_examples=25)
@given(setups(), st.sampled_from(PATHS), st.booleans(), st.sampled_from([0.2, 1.0]))
def test_rows_and_tokens_that_mix_are_the_loop(setup, way, by_token, density):
    adapters, x, generator = setup
    names = named(adapters)[::-1]
    shape = (*x.shape[: 2 if by_token else 1], len(names))
    w = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    weights = spelled(adapters, x)
    for column, name in enumerate(names):
        weights[..., list(adapters).index(name)] += w[..., column] if by_token else w[..., None, column]
    gates = Gates.tokens(names, w) if by_token else Gates.weights(names, w)
    check(adapters, gates, weights, x, way)


@settings(max_examples=25)
@given(setups(), st.sampled_from(["auto", "loop"]))
def test_weights_that_are_learned_get_their_gradient(setup, way):
    adapters, x, generator = setup
    names = named(adapters)
    w = torch.rand(len(x), len(names), generator=generator).requires_grad_()
    weights = spelled(adapters, x)
    weights[..., [list(adapters).index(name) for name in names]] += w.detach().unsqueeze(1)
    forward(adapters, Gates.weights(names, w), x, way)
    wanted = oracle(adapters, weights, x)[3].sum(1)
    close(w.grad, wanted[:, [list(adapters).index(name) for name in names]])


@settings(max_examples=25)
@given(setups(), st.integers(1, 5), st.sampled_from(["softmax", "none", "uniform"]), st.booleans())
def test_routed_tokens_are_the_loop(setup, k, normalise, shut):
    adapters, x, generator = setup
    names = named(adapters)
    k = min(k, len(names))
    matrices = {name: torch.randn(len(names), WIDTH, generator=generator) for name in OUT}
    closed = torch.arange(len(names)) < shut
    router = {name: lambda inner, m=m: (inner @ m.t()).masked_fill(closed, -torch.inf) for name, m in matrices.items()}
    outs, store = forward(adapters, Gates.routed(router, names, k, normalise=normalise) + Gates.rows([names[0]] * len(x)), x, "auto")
    for name in OUT:
        scores = router[name](x.detach().double().float()).double()
        weights = spelled(adapters, x).double()
        for b in range(len(x)):
            for s in range(x.shape[1]):
                best = sorted(range(len(names)), key=lambda e, at=scores[b, s]: -float(at[e]))[:k]
                kept = torch.stack([scores[b, s, e] for e in best])
                share = {"softmax": kept.softmax(0), "none": kept, "uniform": torch.full_like(kept, 1 / k)}[normalise]
                for e, value, score in zip(best, share, kept, strict=True):
                    if score > -torch.inf:
                        weights[b, s, list(adapters).index(names[e])] += value
                weights[b, s, list(adapters).index(names[0])] += 1
        close(outs[name], oracle(adapters, weights, x)[0][name])
    assert store is not None


@settings(max_examples=10)
@given(st.integers(2, 5), st.integers(1, 4), st.sampled_from(["loop", "batched", "segments", *PATHS[5:]]))
def test_dropout_draws_one_mask_per_row_and_goes_back_through_it(rows, tokens, way):
    own = {name: adapter(name, 2, seed, dropout=0.4) for seed, name in enumerate(("a", "b"))}
    x = torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(rows)).requires_grad_()
    picks = [("a", "b")[row % 2] for row in range(rows)]
    torch.manual_seed(5)
    outs, store = forward(own, Gates.rows(picks), x, way)
    torch.manual_seed(5)
    mask = torch.empty(rows, WIDTH).bernoulli_(0.6).div_(0.6)
    assert 0 < int((mask == 0).sum()) < mask.numel() or rows * WIDTH < 32
    again = x.detach().clone().requires_grad_()
    model, total = Pair(), 0.0
    flats = {name: torch.from_numpy(a.tensors.flat).clone().requires_grad_() for name, a in own.items()}
    for name in OUT:
        spans = own["a"].spec.layout.spans
        rows_out = []
        for row, pick in enumerate(picks):
            down, up = (flats[pick][spans[f"base_model.model.{name}.lora_{f}.weight"]] for f in "AB")
            low = (again[row] * mask[row]) @ down.view(2, WIDTH).t() @ up.view(OUT[name], 2).t()
            rows_out.append(getattr(model, name)(again[row]) + low)
        found = torch.stack(rows_out)
        close(outs[name], found)
        total = total + (found * weights_of(found)).sum()
    total.backward()
    close(x.grad, again.grad)
    for name in own:
        slab, row = store.place[name]
        close(slab.grad(row), flats[name].grad)


@pytest.mark.parametrize("way", ["loop", "batched", "segments", *PATHS[5:]])
def test_autocast_computes_in_its_own_type(way):
    own = {name: adapter(name, 4, seed) for seed, name in enumerate(("a", "b"))}
    x = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted, exact = forward(own, Gates.rows(["a", "b", None, "a"]), x, "loop")
    with torch.autocast("cpu", torch.bfloat16):
        outs, store = forward(own, Gates.rows(["a", "b", None, "a"]), x.detach().requires_grad_(), way)
    for name in OUT:
        assert outs[name].dtype == torch.bfloat16
        assert float((outs[name].detach().float() - wanted[name].detach()).norm()) < 2e-2 * float(wanted[name].detach().norm())
    for slab, row in exact.place.values():
        found = store.slabs[exact.slabs.index(slab)].grad(row)
        assert float((found - slab.grad(row)).norm()) < 3e-2 * float(slab.grad(row).norm())


def test_the_measured_way_is_kept_and_can_be_named(monkeypatch):
    from fedpeft.mixtures import choice

    own = {"a": adapter("a", 2, 0), "b": adapter("b", 2, 1)}
    x = torch.randn(4, 3, WIDTH).requires_grad_()
    asked = []
    monkeypatch.setattr(choice, "FASTEST", {})
    monkeypatch.setattr(
        choice, "_seconds", lambda way, plan, shape: asked.append(type(way).__name__) or float(type(way).__name__ != "Segments")
    )
    for _ in range(3):
        forward(own, Gates.rows(["a", "b", "a", None]), x, "auto")
    assert asked == ["Batched", "Segments", "Grouped", *(["Fused"] if INTERPRETED else [])]
    assert set(choice.FASTEST.values()) == {"segments"}
    forward(own, Gates.rows(["a", "b", "a", None]), x, "batched")
    assert len(asked) == 3 + INTERPRETED


def test_settled_choices_are_those_of_another_process_and_nothing_is_timed_for_them(monkeypatch):
    from fedpeft.mixtures import choice

    plan = pairs_of_rows([0, 1], 2, torch.device("cpu"))
    times = {"Batched": 3.0, "Segments": 1.0, "Grouped": 2.0, "Fused": 9.5}
    monkeypatch.setattr(choice, "FASTEST", {})
    monkeypatch.setattr(choice, "_seconds", lambda way, plan, shape: times[type(way).__name__])
    shapes = [choice.Shape(2**power, torch.float32, 2, 8, 8, True) for power in range(5)]
    first = choice.Choices()
    assert [first(plan, shape) for shape in shapes[:3]] == ["segments"] * 3
    first.settled = True
    times |= {"Segments": 9.0}
    choice.FASTEST.clear()
    second, stranger = choice.Choices(), choice.Choices()
    second.recall({**first.kept, "mps nowhere": "fused", "cpu then": "no way"})
    assert second.kept == first.kept
    for each in (first, second):
        assert [each(plan, shape) for shape in shapes] == ["segments"] * 5  # the last two as most others, whatever is fastest now
        assert len(each.kept) == 3
    assert stranger(plan, shapes[0]) == "grouped"
    times["Grouped"] = float("inf")
    third = choice.Choices({"x": "grouped", "y": "grouped", "z": "batched"}, settled=True)
    assert third(plan, shapes[0]) == choice.AFTER  # what most take cannot run for this shape


def test_a_way_that_the_device_lacks_is_never_chosen(monkeypatch):
    from fedpeft.mixtures import choice

    monkeypatch.setattr(choice, "FASTEST", {})
    monkeypatch.setattr(choice.Batched, "down", lambda *_: (_ for _ in ()).throw(RuntimeError("no such product here")))
    own = {"a": adapter("a", 2, 0)}
    outs, _ = forward(own, Gates.rows(["a"]), torch.randn(1, 2, WIDTH).requires_grad_(), "auto")
    assert "batched" not in choice.FASTEST.values()
    assert outs["q"].shape == (1, 2, OUT["q"])
