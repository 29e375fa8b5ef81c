"""Hybrids by composition: what is refused, what parts keep, and how they average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.methods.blends import spec_of
from fedpeft.methods.blends.compose import Compose
from fedpeft.tensors import Entry, Layout, Tensors

TABLES = {
    "mam": ["prefix", {"kind": "parallel", "dim": 5}],
    "rosa": [{"kind": "lora", "r": 4, "targets": ["all"]}, {"kind": "sparse-magnitude", "density": 0.02}],
}

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model with `tie_word_embeddings")


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


def test_a_list_is_the_short_form():
    assert build(METHODS, ["prefix", "parallel"], "method") == build(
        METHODS, {"kind": "compose", "parts": ["prefix", "parallel"]}, "method"
    )
    with pytest.raises(ValueError, match="needs a table"):
        build({"lora": METHODS["lora"]}, ["lora", "ia3"], "method")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["lora"], "at least 2"),
        (["lora", "lora"], "a kind of its own"),
        (["lora", ["ia3", "bitfit"]], "none may be a compose"),
        (["lora", "magic"], "unknown kind 'magic'"),
        ([{"kind": "lora", "alpha": 16}, {"kind": "hydralora", "alpha": 8}], "role B has learning-rate scales"),
    ],
)
def test_parts_that_cannot_be_one_adapter_are_refused(parts, reason):
    with pytest.raises(ValueError, match=reason):
        build(METHODS, parts, "method")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([{"kind": "lora", "alpha": 8}, "core"], r"core holds .*lora_A.weight, which an earlier part holds"),
        (["core", {"kind": "lora", "alpha": 8}], r"lora holds .*lora_"),
        (["prefix", "prompt"], "prefix and prompt both wrap the whole model"),
        (["lora", {"kind": "reft", "r": 64}], "exceeds the hidden width"),
    ],
)
def test_parts_that_clash_leave_the_model_as_it_was(parts, reason, make, head_of, inputs_of):
    model = make("bert")
    before, modules = logits(model, inputs_of("bert")), {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=reason):
        build(METHODS, parts, "method").attach(model, head_of("bert"))
    assert modules == {name: id(module) for name, module in model.named_modules()}
    assert torch.equal(logits(model, inputs_of("bert")), before)
    lora = METHODS["lora"]()
    lora.detach(lora.attach(model, head_of("bert")))


def test_another_method_cannot_take_a_hybrid_off(make, head_of):
    model = make("bert")
    compose, lora = Compose(), METHODS["lora"]()
    lora.attach(model, head_of("bert"))
    with pytest.raises(AdapterError, match="not a hybrid"):
        compose.detach(model)


def test_parts_keep_names_and_roles_and_share_the_head(make, head_of):
    names = {}
    for table in ("lora", "ia3", ["lora", "ia3"]):
        method, model = build(METHODS, table, "method"), make("bert")
        names[str(table)] = layout_of(method, method.attach(model, head_of("bert"))).entries
    assert set(names["['lora', 'ia3']"]) == set(names["lora"]) | set(names["ia3"])


@pytest.mark.parametrize("parts", [["lora", "bitfit"], ["bitfit", "lora"]])
def test_biases_under_lora_get_their_gradients(parts, make, head_of, inputs_of):
    """The shared low-rank forward gives frozen layers no gradient, so a trained bias must not pass through it."""
    alone, hybrid = (build(METHODS, table, "method") for table in ("bitfit", parts))
    grads = []
    for method in (alone, hybrid):
        model = make("bert")
        live = method.attach(model, head_of("bert"))
        start(method, live, model.config)
        live(**inputs_of("bert")).logits.square().sum().backward()
        grads.append({n.replace(".base_layer", ""): p.grad for n, (r, p) in method.entries(live).items() if r == "bias"})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-5) for name in grads[0])


def layers_at(method, model, head, tensors, x):
    """What every hidden-width linear layer of the trunk makes of ``x`` (N, 32)."""
    from fedpeft.methods.targets import linear_roles, width_in

    live = method.attach(model, head)
    write(method, live, tensors)
    with torch.no_grad():
        rows = [model.get_submodule(name)(x) for name in linear_roles(model) if width_in(model.get_submodule(name)) == 32]
    method.detach(live)
    return torch.cat(rows, -1).double()


@pytest.mark.parametrize(
    ("parts", "moves", "exact"),
    [
        (["bitfit", {"kind": "sparse-seed", "density": 0.1}], None, True),
        ([{"kind": "lora", "r": 2, "targets": ["all"]}, {"kind": "sparse-seed", "density": 0.1}], {"B", "delta"}, True),
        ([{"kind": "lora", "r": 2, "targets": ["all"]}, {"kind": "sparse-seed", "density": 0.1}], None, False),
        ([{"kind": "sparse-seed", "density": 0.1}, "ssf"], None, False),
        (["bitfit", "ia3"], None, False),
    ],
)
def test_hybrids_average_as_their_facts_say(parts, moves, exact, make, head_of):
    from fedpeft.schemes import SCHEMES

    method, model, head = build(METHODS, parts, "method"), make("bert"), head_of("bert")
    live = method.attach(model, head)
    start(method, live, model.config, noise=0.1)
    common = read(method, live)
    method.detach(live)
    rng, moved = np.random.default_rng(5), moves or common.layout.roles
    sites = [
        common.patch(Tensors(p.layout, p.flat + 0.3 * rng.standard_normal(p.flat.size).astype(np.float32)))
        for p in [common.pick(moved)] * 3
    ]
    mean = Tensors(common.layout, np.mean([site.flat for site in sites], 0, dtype=np.float64).astype(np.float32))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    want = torch.stack([layers_at(method, model, head, site, x) for site in sites]).mean(0)
    error = float((layers_at(method, model, head, mean, x) - want).norm() / want.norm())
    assert error < 1e-5 if exact else error > 1e-3
    if moves is None:
        assert (spec_of(method).average == "linear") == exact
        assert SCHEMES["fedavg"]().exact(common.layout) == exact or common.layout.roles == {"bias", "head", "scale"}
    else:
        assert "ffa" in spec_of(method).exact_with


def test_facts_of_a_hybrid_are_those_that_all_parts_have():
    rosa = spec_of(build(METHODS, TABLES["rosa"], "method"))
    assert (rosa.average, rosa.mergeable, rosa.family) == ("bilinear", True, "hybrid")
    assert {"alternating", "ffa"} <= set(rosa.exact_with)
    assert spec_of(build(METHODS, ["lora", "ia3"], "method")).exact_with == ()
    assert not spec_of(build(METHODS, TABLES["mam"], "method")).identity
