"""Every method of the table on every tiny model: what the Protocol promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, BitFit, Bottleneck, Core, Lora, PrefixTuning, PromptTuning
from fedpeft.tensors import Entry, Layout

METHODS_AT_WORK = {
    "lora": Lora(r=4, alpha=8, targets=("all",)),
    "lora-dropout": Lora(r=4, targets=("all",), dropout=0.1),
    "rslora": Lora(r=4, targets=("attention",), rslora=True),
    "dora": Lora(r=4, targets=("mlp",), dora=True),
    "lora-extra": Lora(r=4, targets=("all",), extra=3),
    "core": Core(r=4, targets=("all",)),
    "ia3": METHODS["ia3"](),
    "bitfit": BitFit(),
    "prompt": PromptTuning(tokens=3),
    "prefix": PrefixTuning(tokens=3),
    "bottleneck": Bottleneck(dim=5),
}
REFUSED = {
    ("bitfit", "llama"),
    ("bitfit", "llama-classifier"),
    ("bitfit", "t5"),
    ("prompt", "t5"),
    ("prefix", "t5"),
    ("prompt", "llama-classifier"),
    ("prefix", "distilbert"),
}
MODELS = ("bert", "roberta", "distilbert", "llama-classifier", "llama", "gpt2", "t5")
VARIANTS = ("lora-dropout", "lora-extra", "rslora", "dora")
PAIRS = [(m, b) for m in METHODS_AT_WORK for b in (("bert", "gpt2") if m in VARIANTS else MODELS) if (m, b) not in REFUSED]
OWN = ("bitfit", "bottleneck", "core", "lora-extra")

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:.*is_gradient_checkpointing", "ignore:Model with `tie_word_embeddings"
)


def layout_of(method, live):
    return Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in method.entries(live).items()])


def start(method, live, config, seed=0, noise=0.0):
    """Round-0 values, and more where a method's start is the identity."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, (role, parameter) in method.entries(live).items():
        first = method.initial(Entry(role, name, tuple(parameter.shape)), rng, config)
        values[name] = parameter.detach().clone() if first is None else torch.from_numpy(first)
        values[name] += noise * torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
    write(method, live, values)
    return values


def write(method, live, values):
    for name, (_, parameter) in method.entries(live).items():
        parameter.data = values[name].clone()


def logits(live, inputs):
    with torch.no_grad():
        return live(**inputs).logits


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pair(request, make, head_of, inputs_of):
    method, model = request.param
    return METHODS_AT_WORK[method], make(model), head_of(model), inputs_of(model), method, model


def test_starts_as_the_base_learns_rebuilds_and_detaches_without_a_trace(pair, make):
    method, model, head, inputs, kind, name = pair
    modules = {key: id(module) for key, module in model.named_modules()}
    tensors = {key: (id(p), p.detach().clone()) for key, p in model.named_parameters()}
    state, before = torch.get_rng_state(), logits(model, inputs)
    live = method.attach(model, head)
    assert torch.equal(state, torch.get_rng_state())
    if kind not in ("prompt", "prefix"):
        assert torch.allclose(logits(live, inputs), before, atol=1e-6)
    with pytest.raises(AdapterError, match="still attached"):
        method.attach(model, head)
    start(method, live, model.config)
    trained = train(method, live, inputs)
    heads = {key.rpartition("base_model.")[2].removeprefix("model.") for key, (role, _) in method.entries(live).items() if role == "head"}
    assert bool(heads) == (head.kind == "classification")
    other = method.attach(make(name), head)
    write(method, other, trained)
    assert torch.equal(logits(other, inputs), logits(live, inputs))
    start(method, live, model.config, noise=0.1)
    assert not torch.allclose(logits(live, inputs), before, atol=1e-4)
    method.detach(live)
    assert modules == {key: id(module) for key, module in model.named_modules()}
    for key, parameter in model.named_parameters():
        assert tensors[key][0] == id(parameter)
        assert key in heads or torch.equal(tensors[key][1], parameter)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if not heads:
        assert torch.equal(logits(model, inputs), before)
    method.detach(method.attach(model, head))


def train(method, live, inputs):
    """Its entries are all that trains, each is reached, and three steps lower the loss; the trained values."""
    entries = method.entries(live)
    assert entries
    assert {id(p) for p in live.parameters() if p.requires_grad} == {id(p) for _, p in entries.values()}
    assert all(p.dtype == torch.float32 for _, p in entries.values())
    optimizer, losses = torch.optim.AdamW([p for _, p in entries.values()], lr=1e-2), []
    target = torch.full_like(logits(live, inputs), 0.3)
    for _ in range(4):
        loss = (live(**inputs).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # an unused key bias has no effect under softmax, all else must be reached
    assert [key for key, (_, p) in entries.items() if p.grad is None] == []
    assert losses[-1] < losses[0]
    return {key: p.detach().clone() for key, (_, p) in entries.items()}


def test_seeds_alone_make_the_start_that_peft_loads_and_shapes_alone_the_layout(pair, make, tmp_path):
    method, model, head, inputs, kind, name = pair
    live = method.attach(model, head)
    layout = layout_of(method, live)
    torch.manual_seed(1)
    one = start(method, live, model.config, seed=5)
    torch.manual_seed(2)
    two, other = start(method, live, model.config, seed=5), start(method, live, model.config, seed=6)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one) or method.kind in ("ia3", "bitfit")
    first = [method.initial(entry, np.random.default_rng(0), model.config) for entry in layout.entries]
    assert any(value is None for value in first) == method.needs_weights
    for value, entry in zip(first, layout.entries, strict=True):
        assert value is None or (value.dtype == np.float32 and value.shape == entry.shape)
    assert layout_of(method, method.attach(make(name).to("meta"), head)) == layout
    start(method, live, model.config, noise=0.1)
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.peft_config(name, head, layout)))
    save_file({key: p.detach().contiguous() for key, (_, p) in method.entries(live).items()}, tmp_path / "adapter_model.safetensors")
    if kind in OWN:
        with pytest.raises((ValueError, KeyError)):
            PeftModel.from_pretrained(make(name), tmp_path)
        return
    want, got = logits(PeftModel.from_pretrained(make(name), tmp_path).eval(), inputs), logits(live.eval(), inputs)
    assert torch.allclose(got, want[:, -got.shape[1] :] if want.dim() == 3 else want, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), sorted(REFUSED))
def test_what_cannot_work_is_refused_with_a_way_out(kind, name, make, head_of):
    model = make(name)
    with pytest.raises(AdapterError, match=r"use .*lora"):
        METHODS_AT_WORK[kind].attach(model, head_of(name))
    lora = METHODS_AT_WORK["lora"]
    lora.detach(lora.attach(model, head_of(name)))


@pytest.mark.parametrize("method", METHODS_AT_WORK.values(), ids=METHODS_AT_WORK.keys())
def test_described_and_built_again(method):
    table = describe(method)
    assert json.loads(json.dumps(table)) == table
    assert build(METHODS, table, "method") == method


@pytest.mark.parametrize("table", [{"r": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"targets": []}, {"rank": 4}])
def test_settings_out_of_range_are_named(table):
    with pytest.raises(ValueError, match=next(iter(table))):
        build(METHODS, {"kind": "lora", **table}, "method")


def test_the_folded_scale_trains_as_the_papers():
    assert Lora(r=8, alpha=16).lr_scale("B") == 2.0
    assert Lora(r=16, alpha=8, rslora=True).lr_scale("B") == 2.0
    assert Lora(r=8, alpha=16).lr_scale("A") == 1.0
    torch.manual_seed(0)
    x, y, a = torch.randn(20, 6), torch.randn(20, 5), torch.randn(4, 6)
    ours, theirs = torch.zeros(5, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    method = Lora(r=4, alpha=12)
    fold = torch.optim.Adam([ours], lr=0.01 * method.lr_scale("B"), eps=1e-12)
    plain = torch.optim.Adam([theirs], lr=0.01, eps=1e-12)
    for _ in range(20):
        for optimizer, b, scale in ((fold, ours, 1.0), (plain, theirs, 3.0)):
            optimizer.zero_grad()
            (x @ a.t() @ b.t() * scale - y).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours, 3.0 * theirs, atol=1e-5)
