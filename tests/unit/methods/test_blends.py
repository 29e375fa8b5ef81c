"""Methods made of methods on tiny models of every kind: what the Protocol and their facts promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, AdapterSpec, load, save
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.blends import BLEND_SPECS, BLENDS, spec_of
from fedpeft.tensors import Entry, Layout, Tensors

TABLES = {
    "compose": {"kind": "compose", "parts": [{"kind": "lora", "r": 4, "targets": ["all"]}, {"kind": "bottleneck", "dim": 5}]},
    "mam": ["prefix", {"kind": "parallel", "dim": 5}],
    "rosa": [{"kind": "lora", "r": 4, "targets": ["all"]}, {"kind": "sparse-magnitude", "density": 0.02}],
    "tuned-thrice": ["ia3", {"kind": "lora", "r": 2}, {"kind": "houlsby", "dim": 3}, "ssf"],
    "biased": [{"kind": "lora", "r": 4}, "bitfit", {"kind": "prompt", "tokens": 2}],
    "unipelt": {"kind": "unipelt", "r": 4, "tokens": 3, "dim": 5},
    "adapterfusion": {"kind": "adapterfusion", "dim": 5, "experts": ["mail", "news", "code"]},
    "hydralora": {"kind": "hydralora", "r": 4, "experts": 3},
    "molora": {"kind": "molora", "r": 4, "experts": 3},
    "mpt": {"kind": "mpt", "tokens": 3},
    "attempt": {"kind": "attempt", "tokens": 3, "dim": 4},
}
MODELS = {
    "mam": ("bert", "llama-classifier"),
    "rosa": ("bert", "gpt2"),
    "tuned-thrice": ("bert", "llama"),
    "biased": ("bert",),
    "mpt": ("llama",),
    "attempt": ("bert", "distilbert"),
}
PAIRS = [(name, model) for name in TABLES for model in MODELS.get(name, ("gpt2", "t5"))]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model with `tie_word_embeddings")


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def at_work(request, make, head_of, inputs_of):
    name, model = request.param
    return build(METHODS, TABLES[name], "method"), make(model), head_of(model), inputs_of(model), model


def layout_of(method, live):
    return Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in method.entries(live).items()])


def start(method, live, config, noise=0.0, seed=3):
    rng = np.random.default_rng(seed)
    for name, (role, parameter) in method.entries(live).items():
        first = method.initial(Entry(role, name, tuple(parameter.shape)), rng, config)
        if first is not None and role != "head":
            parameter.data = torch.from_numpy(first)
        if role in spec_of(method).trained:
            parameter.data = parameter.data + noise * torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))


def logits(live, inputs):
    with torch.no_grad():
        return live(**inputs).logits


def read(method, live):
    layout = layout_of(method, live)
    return Tensors.from_named(layout, {name: p.detach().numpy() for name, (_, p) in method.entries(live).items()})


def write(method, live, tensors):
    named = tensors.named()
    for name, (_, parameter) in method.entries(live).items():
        parameter.data = torch.from_numpy(named[name].copy())


def test_facts_are_there_for_every_blend():
    assert set(BLENDS) == set(BLEND_SPECS)
    assert all(SPECS[kind] is BLEND_SPECS[kind] for kind in BLENDS)


def test_starts_as_declared_learns_and_detaches_without_a_trace(at_work, make, tmp_path):
    method, model, head, inputs, name = at_work
    modules = {key: id(module) for key, module in model.named_modules()}
    tensors = {key: (id(p), p.detach().clone()) for key, p in model.named_parameters()}
    state, before = torch.get_rng_state(), logits(model, inputs)
    live = method.attach(model, head)
    assert torch.equal(state, torch.get_rng_state())
    start(method, live, model.config)
    assert torch.allclose(logits(live, inputs), before, atol=2e-6) == spec_of(method).identity
    with pytest.raises(AdapterError, match="still attached"):
        method.attach(model, head)
    train(method, live, inputs)
    start(method, live, model.config, noise=0.3)  # every tensor matters, routers and frozen experts included
    assert not torch.allclose(logits(live, inputs), before, atol=1e-4)
    rebuild(method, live, make(name), head, inputs, tmp_path / "a")
    method.detach(live)
    assert modules == {key: id(module) for key, module in model.named_modules()}
    assert all(tensors[key][0] == id(p) and torch.equal(tensors[key][1], p) for key, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model, inputs), before)


def train(method, live, inputs):
    """What the facts call trained is all that trains, each tensor of it is reached, and a few steps lower the loss."""
    spec, entries = spec_of(method), method.entries(live)
    assert {role for role, _ in entries.values()} - {"head"} <= set(spec.tensors)
    trained = {key: (role, p) for key, (role, p) in entries.items() if role in spec.trained | {"head"}}
    assert {id(p) for p in live.parameters() if p.requires_grad} == {id(p) for _, p in trained.values()}
    assert all(p.dtype == torch.float32 for _, p in entries.values())
    target = torch.full_like(logits(live.eval(), inputs), 0.3)
    groups = [{"params": [p], "lr": spec.learning_rate * method.lr_scale(role)} for role, p in trained.values() if role != "head"]
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(4):
        loss = (live.train()(**inputs).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float((logits(live.eval(), inputs) - target).square().mean()))
    assert losses[-1] < losses[0]
    assert [key for key, (_, p) in trained.items() if p.grad is None] == []


def rebuild(method, live, fresh, head, inputs, folder):
    """The saved folder alone makes of ``fresh`` what ``live`` is."""
    adapter = Adapter(AdapterSpec("t", "0" * 64, "base", method, head, layout_of(method, live)), read(method, live))
    save(adapter, folder)
    again = load(folder)
    assert again.digest == adapter.digest
    assert again.spec.method == method
    other = again.spec.method.attach(fresh, head)
    assert not torch.equal(logits(other, inputs), logits(live, inputs))
    write(method, other, again.tensors)
    assert torch.equal(logits(other, inputs), logits(live, inputs))


def test_a_base_without_weights_gives_the_same_layout(at_work, make):
    method, model, head, _, name = at_work
    meta = make(name).to("meta")
    one, two = layout_of(method, method.attach(model, head)), layout_of(method, method.attach(meta, head))
    assert one == two
    first = [method.initial(entry, np.random.default_rng(0), model.config) for entry in two.entries]
    assert any(value is None for value in first) == method.needs_weights
    config = method.peft_config(name, head, one)
    assert json.loads(json.dumps(config))["peft_type"] == f"FEDPEFT_{method.kind.upper()}"
    assert build(METHODS, json.loads(json.dumps(describe(method))), "method") == method
