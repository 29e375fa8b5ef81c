"""What every entry of METHODS is held to: its declared facts, on the smallest model that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.spec import EVERY_BASE, check_base
from fedpeft.methods.tuners import REFUSED
from fedpeft.tensors import Entry, Layout

UNTRAINED_BY_DEFAULT: dict[str, set[str]] = {
    "lora": {"M", "A2", "B2"},
    "compose": {"M", "A2", "B2"},
    "lokr": {"M"},
    "glora": {"shift"},
    "peanut": {"inner"},
}
"""Roles that a setting, or a base with biases, brings."""
READS_WEIGHTS = {"adamss", "frod", "shira"}
"""What cannot even be laid out without the base's weights."""
KINDS = sorted(METHODS)

pytestmark = pytest.mark.filterwarnings("ignore")


each = pytest.mark.parametrize("case", KINDS, indirect=True)


def test_facts_and_methods_have_the_same_names():
    assert set(SPECS) == set(METHODS)
    assert not set(REFUSED) & set(METHODS)
    assert all(len(reason) > 20 for reason in REFUSED.values())


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_whole(kind):
    spec = SPECS[kind]
    assert spec.paper
    assert spec.summary
    assert spec.trained
    assert spec.bases <= EVERY_BASE
    assert "none" in spec.bases
    assert 0 < spec.learning_rate < 1
    assert (METHODS[kind].__doc__ or "").strip()


@each
def test_starts_as_declared_learns_and_rebuilds(case):
    model = case.make(case.model)
    before, state = case.logits(model), torch.get_rng_state()
    photo = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    model, live = case.attach(model)
    assert torch.equal(state, torch.get_rng_state())
    entries = case.method.entries(live)
    roles = {role for role, _ in entries.values()}
    spec = SPECS[case.kind]
    assert roles - {"head"} <= set(spec.tensors)
    assert spec.trained - roles <= UNTRAINED_BY_DEFAULT.get(case.kind, set())
    assert {id(p) for p in live.parameters() if p.requires_grad} <= {id(p) for _, p in entries.values()}
    plan(case, entries)
    start = case.values(live, model.config)
    case.write(live, {name: v if entries[name][0] != "head" else entries[name][1].data for name, v in start.items()})
    assert torch.allclose(case.logits(live), before, atol=2e-6) == spec.identity
    trained = train(case, live, spec)
    _, again = case.attach()
    case.write(again, trained)
    assert torch.allclose(case.logits(again), case.logits(live), atol=1e-6)
    case.method.detach(live)
    assert modules == {name: id(module) for name, module in model.named_modules()}
    heads = {id(p) for name, (role, p) in entries.items() if role == "head"}
    for name, p in model.named_parameters():
        assert photo[name][0] == id(p), name
        assert id(p) in heads or torch.equal(photo[name][1], p), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    case.method.detach(case.attach(model)[1])


def plan(case, entries):
    """A coordinator plans with shapes alone: a base without weights gives the same layout, or what must read weights says so."""

    def layout(entries):
        return Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in entries.items()])

    meta = case.make(case.model).to("meta")
    if case.kind not in READS_WEIGHTS:
        assert layout(case.method.entries(case.method.attach(meta, case.head))) == layout(entries)
        return
    assert case.method.needs_weights  # or a coordinator would plan it on shapes alone
    with pytest.raises(AdapterError, match=f"{case.kind}: .*use load_base"):
        case.method.attach(meta, case.head)


def train(case, live, spec, steps=4):
    """A few steps at the declared rate lower the loss; the trained values."""
    entries = case.method.entries(live)
    groups = [{"params": [p], "lr": spec.learning_rate * case.method.lr_scale(role)} for role, p in entries.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups)
    target = torch.full_like(case.logits(live), 0.3)
    losses = []
    live.train()
    for _ in range(steps):
        torch.manual_seed(0)
        loss = (live(**case.inputs).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return {name: p.detach().clone() for name, (_, p) in entries.items()}


def dense4(model: nn.Module) -> nn.Module:
    """The blocks' linear layers in nf4."""
    import bitsandbytes as bnb

    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and any(c.isdigit() for c in name)]:
        parent, _, leaf = name.rpartition(".")
        small = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        small.support_avx512bf16_for_cpu = False
        small.load_state_dict(module.state_dict())
        setattr(model.get_submodule(parent), leaf, small.to("cpu"))
    return model


NARROW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": dense4,
    "bf16": lambda model: model.to(torch.bfloat16),
    "fp16": lambda model: model.to(torch.float16),
}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KEPT: dict[tuple[str, str], nn.Module] = {}


NAMED = [(kind, q) for kind in KINDS for q in sorted(NARROW) if q in SPECS[kind].bases]
"""What the facts promise. In fp16 all methods but lora wait for the slow tests: its casts are those of bf16."""


@pytest.mark.parametrize(("kind", "quantization"), [(kind, q) for kind in KINDS for q in sorted(EVERY_BASE - SPECS[kind].bases)])
def test_other_bases_are_refused_by_name(kind, quantization):
    with pytest.raises(AdapterError, match=f"{kind}: does not train on a base with quantization '{quantization}'"):
        check_base(kind, SPECS[kind], quantization)


@pytest.mark.parametrize(
    ("case", "quantization"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair[1] == "fp16" and pair[0] != "lora" else ()) for pair in NAMED],
    indirect=["case"],
)
def test_trains_on_the_bases_that_it_names(case, shake, quantization):
    """One model of each precision for all methods: what one left behind would show in the next."""
    model = KEPT.get((case.model, quantization)) or NARROW[quantization](case.make(case.model))
    if case.head.kind == "lm":
        KEPT[case.model, quantization] = model
    half = HALVES.get(quantization)
    inputs = {name: v.to(half) if half and v.is_floating_point() else v for name, v in case.inputs.items()}
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    live = case.method.attach(model, case.head)
    case.write(live, shake(case.values(live, model.config), case.moving(live)))
    live.train()(**inputs).logits.float().square().sum().backward()
    trained = {name: p for name, (_, p) in case.method.entries(live).items() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert [name for name, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())] == []
    assert any(p.grad.any() for p in trained.values())
    case.method.detach(live)
    if case.head.kind == "lm":
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, before)


@each
def test_described_and_built_again(case):
    table = describe(case.method)
    assert json.loads(json.dumps(table)) == table
    assert build(METHODS, table, "method") == case.method
