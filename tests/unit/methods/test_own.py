"""Our own methods on tiny models of every kind, images included: what the Protocol and their facts promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.own import OWN
from fedpeft.tensors import Entry, Layout

SMALL = {"houlsby": {"dim": 6}, "pfeiffer": {"dim": 6}, "parallel": {"dim": 6}, "compacter": {"dim": 8}, "lst": {"reduction": 4}}
SMALL |= {kind: {"density": 0.02} for kind in OWN if kind.startswith("sparse")} | {"vpt": {"tokens": 3}}
MODELS = ("bert", "llama", "gpt2", "t5", "vit")
FEWER = {"vpt": ("vit",), "pfeiffer": ("bert",), "peqa": ("bert", "gpt2"), "sparse-fisher": ("bert",), "sparse-lottery": ("gpt2",)}
PAIRS = [(kind, model) for kind in OWN for model in FEWER.get(kind, MODELS)]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def at_work(request, shell):
    kind, name = request.param
    return build(METHODS, {"kind": kind, **SMALL.get(kind, {})}, "method"), *shell(name), name


@pytest.fixture(scope="session")
def shell(make, head_of, inputs_of):
    def find(name):
        if name != "vit":
            return make(name), head_of(name), inputs_of(name)
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).eval()
            images = torch.randn(2, 3, 16, 16)
        return model, HeadSpec("classification", ("a", "b", "c")), {"pixel_values": images}

    return find


def layout_of(method, live):
    return Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in method.entries(live).items()])


def start(method, live, config, noise=0.0):
    rng = np.random.default_rng(3)
    for name, (role, parameter) in method.entries(live).items():
        first = method.initial(Entry(role, name, tuple(parameter.shape)), rng, config)
        if first is not None and role != "head":
            parameter.data = torch.from_numpy(first)
        if role in SPECS[method.kind].trained:
            parameter.data = parameter.data + noise * torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))


def logits(live, inputs):
    with torch.no_grad():
        return live(**inputs).logits


def test_starts_as_declared_learns_rebuilds_and_detaches_without_a_trace(at_work, shell):
    method, model, head, inputs, name = at_work
    modules = {key: id(module) for key, module in model.named_modules()}
    tensors = {key: (id(p), p.detach().clone()) for key, p in model.named_parameters()}
    state, before = torch.get_rng_state(), logits(model, inputs)
    live = method.attach(model, head)
    assert torch.equal(state, torch.get_rng_state())
    start(method, live, model.config)
    assert torch.allclose(logits(live, inputs), before, atol=2e-6) == SPECS[method.kind].identity
    train(method, live, inputs)
    entries, other = method.entries(live), method.attach(shell(name)[0], head)
    for key, (_, parameter) in method.entries(other).items():
        parameter.data = entries[key][1].detach().clone()
    assert torch.allclose(logits(other, inputs), logits(live, inputs), atol=1e-6)
    start(method, live, model.config, noise=0.3)
    assert not torch.allclose(logits(live, inputs), before, atol=1e-4)
    method.detach(live)
    assert modules == {key: id(module) for key, module in model.named_modules()}
    assert all(tensors[key][0] == id(p) and torch.equal(tensors[key][1], p) for key, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.allclose(logits(model, inputs), before, atol=2e-6)


def train(method, live, inputs):
    """What the facts call trained is all that trains, each tensor of it is reached, and three steps lower the loss."""
    spec, entries = SPECS[method.kind], method.entries(live)
    assert {role for role, _ in entries.values()} - {"head"} == set(spec.tensors)
    trained = {key: (role, p) for key, (role, p) in entries.items() if role in spec.trained | {"head"}}
    assert {id(p) for p in live.parameters() if p.requires_grad} == {id(p) for _, p in trained.values()}
    assert all(p.dtype == torch.float32 for _, p in entries.values())
    target = torch.full_like(logits(live, inputs), 0.3)
    groups = [{"params": [p], "lr": spec.learning_rate * method.lr_scale(role)} for role, p in trained.values() if role != "head"]
    optimizer, losses = torch.optim.AdamW(groups), [float((logits(live.eval(), inputs) - target).square().mean())]
    for _ in range(4):
        loss = (live.train()(**inputs).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(float((logits(live.eval(), inputs) - target).square().mean()))
    assert losses[-1] < losses[0]
    assert [key for key, (_, p) in trained.items() if p.grad is None] == []


def test_a_base_without_weights_gives_the_same_layout(at_work, shell):
    method, model, head, _, name = at_work
    meta = shell(name)[0].to("meta")
    one, two = layout_of(method, method.attach(model, head)), layout_of(method, method.attach(meta, head))
    assert one == two
    first = [method.initial(entry, np.random.default_rng(0), model.config) for entry in two.entries]
    assert any(value is None for value in first) == method.needs_weights
    assert all(value is None or (value.dtype == np.float32 and value.shape == e.shape) for value, e in zip(first, two.entries, strict=True))
    config = method.peft_config(name, head, one)
    assert json.loads(json.dumps(config))["peft_type"] == f"FEDPEFT_{method.kind.upper().replace('-', '_')}"
    assert all(any(entry.name.startswith(f"base_model.model.{host}") for entry in one.entries) for host in config["target_modules"])


@pytest.mark.parametrize("kind", OWN)
def test_stock_peft_refuses_what_it_cannot_know(kind, make, head_of, tmp_path):
    from peft import PeftConfig

    method, layout = OWN[kind](), Layout.of([Entry("a", "base_model.model.x.y.a", (1,))])
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.peft_config("base", HeadSpec("lm"), layout)))
    with pytest.raises((KeyError, ValueError), match="FEDPEFT"):
        PeftConfig.from_pretrained(tmp_path)
    assert build(METHODS, describe(method), "method") == method


REFUSED = [
    ({"kind": "compacter", "terms": 5}, r"terms = 5 does not divide \[32\]"),
    ({"kind": "compacter", "dim": 6}, r"terms = 4 does not divide \[6\]"),
    ({"kind": "reft", "r": 33}, "r = 33 exceeds the hidden width 32"),
    ({"kind": "lst", "reduction": 64}, "lower reduction = 64"),
    ({"kind": "vpt"}, "takes no images; use prompt"),
    ({"kind": "ssf", "targets": ["nowhere"]}, "'nowhere' selects no linear layer"),
]


@pytest.mark.parametrize(("table", "reason"), REFUSED, ids=[f"{table['kind']}-{i}" for i, (table, _) in enumerate(REFUSED)])
def test_what_cannot_work_is_refused_and_leaves_the_model_free(table, reason, make, head_of):
    model = make("bert")
    with pytest.raises(AdapterError, match=reason):
        build(METHODS, table, "method").attach(model, head_of("bert"))
    houlsby = OWN["houlsby"]()
    houlsby.detach(houlsby.attach(model, head_of("bert")))


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "compacter", "reft", "lst"])
def test_a_model_without_blocks_is_refused(kind):
    with pytest.raises(AdapterError, match="numbered blocks"):
        OWN[kind]().attach(torch.nn.Linear(2, 2), HeadSpec("lm"))


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "parallel", "scale": 0.0},
        {"kind": "houlsby", "dim": 0},
        {"kind": "sparse-seed", "density": 1.5},
        {"kind": "sparse-fisher", "density": 0.0},
        {"kind": "vpt", "tokens": 0},
        {"kind": "peqa", "rank": 2},
    ],
    ids=lambda table: table["kind"],
)
def test_settings_out_of_range_are_named(table):
    with pytest.raises(ValueError, match=f"{table['kind']}.*{list(table)[1]}"):
        build(METHODS, table, "method")
