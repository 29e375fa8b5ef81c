"""What averaging means for our own methods, and each formula against a slow one in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods import SPECS
from fedpeft.methods.grafts import bottleneck_shapes, squeeze
from fedpeft.methods.own import OWN
from fedpeft.methods.own.hooks import _edit, frame, kronecker_sum
from fedpeft.methods.targets import is_linear

WEIGHTS = (0.5, 0.3, 0.2)


def fill(method, live, seed, noise=0.3, only=None):
    """Random values for the trained tensors, as if a site had trained them from a common start."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    for name, (role, parameter) in method.entries(live).items():
        if role in SPECS[method.kind].trained:
            size = tuple(parameter.shape)
            shared, drift = common.standard_normal(size, np.float32), own.standard_normal(size, np.float32)
            parameter.data = torch.from_numpy(shared + (noise * drift if only is None or only(name) else 0.0 * drift))


def values(method, live):
    return {name: p.detach().clone() for name, (_, p) in method.entries(live).items()}


def mean(several):
    return {name: sum(w * one[name] for w, one in zip(WEIGHTS, several, strict=True)) for name in several[0]}


def load(method, live, named):
    for name, (_, parameter) in method.entries(live).items():
        parameter.data = named[name].clone()


def affine(module, width):
    """Weight and bias of a layer with whatever hooks are on it."""
    with torch.no_grad():
        bias = module(torch.zeros(1, width))
        return torch.cat((module(torch.eye(width)) - bias, bias))


def effective(model):
    """The weights of the model as its linear layers behave, norms by their gain and shift."""
    found = {}
    for name, module in model.named_modules():
        if is_linear(module) and any(part.isdigit() for part in name.split(".")):
            found[name] = affine(module, int(module.nx if hasattr(module, "nx") else module.in_features))
    return found


def departure(one, other):
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", [kind for kind in OWN if SPECS[kind].average == "linear"])
def test_the_mean_of_a_linear_method_is_the_mean_of_its_weights(kind, model, make, head_of):
    method, live = OWN[kind](), make(model)
    start = effective(live)
    method.attach(live, head_of(model))
    sites, weights = [], []
    for seed in (1, 2, 3):
        fill(method, live, seed)
        sites.append(values(method, live))
        weights.append(effective(live))
    load(method, live, mean(sites))
    assert departure(effective(live), mean(weights)) < 2e-6
    assert all(not torch.allclose(weights[0][name], start[name], atol=1e-3) for name in start)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 2**16))
def test_stacking_hidden_units_is_the_exact_mean_of_bottlenecks(dims, seed):
    rng, width = np.random.default_rng(seed), 7
    weights = rng.dirichlet(np.ones(len(dims)))
    sites = [{name: rng.standard_normal(shape) for name, shape in bottleneck_shapes(width, dim, width).items()} for dim in dims]
    states = rng.standard_normal((3, width))
    stacked = {
        "down.weight": np.concatenate([site["down.weight"] for site in sites]),
        "down.bias": np.concatenate([site["down.bias"] for site in sites]),
        "up.weight": np.concatenate([w * site["up.weight"] for w, site in zip(weights, sites, strict=True)], axis=1),
        "up.bias": sum(w * site["up.bias"] for w, site in zip(weights, sites, strict=True)),
    }
    got = squeeze({name: torch.from_numpy(value).float() for name, value in stacked.items()}, torch.from_numpy(states))
    want = sum(w * _bottleneck(site, states) for w, site in zip(weights, sites, strict=True))
    assert np.abs(got.numpy() - want).max() < 2e-6 * max(1.0, np.abs(want).max())


def test_plain_means_of_hidden_units_are_measurably_off():
    rng, width = np.random.default_rng(0), 16
    sites = [{name: rng.standard_normal(shape) for name, shape in bottleneck_shapes(width, 4, width).items()} for _ in WEIGHTS]
    states = rng.standard_normal((50, width))
    want = sum(w * _bottleneck(site, states) for w, site in zip(WEIGHTS, sites, strict=True))
    plain = _bottleneck({name: sum(w * site[name] for w, site in zip(WEIGHTS, sites, strict=True)) for name in sites[0]}, states)
    assert np.linalg.norm(plain - want) / np.linalg.norm(want) > 0.3


def _bottleneck(own, states):
    inner = torch.from_numpy(states @ own["down.weight"].T + own["down.bias"])
    return F.gelu(inner).numpy() @ own["up.weight"].T + own["up.bias"]


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_where_bottlenecks_sit(kind, make, head_of, rows):
    """Llama's blocks, written out: what each attention and each MLP adds to the residual stream."""
    method, model = OWN[kind](dim=5), make("llama")
    live = method.attach(model, head_of("llama"))
    fill(method, live, 1)
    own = {name.removeprefix("base_model.model."): value for name, value in values(method, live).items()}
    with torch.no_grad():
        got = live.model(**rows).last_hidden_state
        method.detach(live)
        assert torch.allclose(got, _llama(model.model, rows, kind, own), atol=1e-5)


def _llama(trunk, rows, kind, own):
    def extra(name, states):
        part = {n.removeprefix(f"{name}.{kind}."): v for n, v in own.items() if n.startswith(f"{name}.{kind}.")}
        return squeeze(part, states) if part else 0.0

    states = trunk.embed_tokens(rows["input_ids"])
    turn = trunk.rotary_emb(states, torch.arange(states.shape[1])[None])
    causal = torch.full((states.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    mask = causal + torch.where(rows["attention_mask"][:, None, None] == 0, -torch.inf, 0.0)
    for number, block in enumerate(trunk.layers):
        path = f"model.layers.{number}"
        found = block.self_attn(block.input_layernorm(states), position_embeddings=turn, attention_mask=mask)[0]
        states = states + found + extra(f"{path}.self_attn.o_proj", found)
        read = block.post_attention_layernorm(states)
        found = block.mlp(read)
        states = states + found + extra(f"{path}.mlp.down_proj", read if kind == "parallel" else found)
    return trunk.norm(states)


def test_parallel_trains_as_the_papers_scaled_one():
    method = OWN["parallel"](scale=4.0)
    assert (method.lr_scale("up"), method.lr_scale("down"), method.lr_scale("head")) == (4.0, 1.0, 1.0)
    torch.manual_seed(0)
    x, y, inner = torch.randn(20, 6), torch.randn(20, 6), torch.randn(20, 5)
    ours, theirs = torch.zeros(6, 5, requires_grad=True), torch.zeros(6, 5, requires_grad=True)
    fold, plain = (torch.optim.Adam([p], lr=lr, eps=1e-12) for p, lr in ((ours, 0.04), (theirs, 0.01)))
    for _ in range(10):
        for optimizer, up, scale in ((fold, ours, 1.0), (plain, theirs, 4.0)):
            optimizer.zero_grad()
            (x + scale * inner @ up.t() - y).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours, 4.0 * theirs, atol=1e-5)


def test_parallel_refuses_a_layer_called_out_of_its_mlp(make, head_of):
    model = make("bert")
    OWN["parallel"]().attach(model, head_of("bert"))
    with pytest.raises(AdapterError, match="without its first"):
        model.bert.encoder.layer[0].output.dense(torch.zeros(1, 64))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**16))
def test_kronecker_sums_are_those_of_the_matrices(terms, wide, small, seed):
    rng = np.random.default_rng(seed)
    slow, left, right = (rng.standard_normal(shape) for shape in ((terms, terms, terms), (terms, wide), (terms, small)))
    states = rng.standard_normal((2, 5, terms * wide))
    matrix = sum(np.kron(slow[i], np.outer(right[i], left[i])) for i in range(terms))
    got = kronecker_sum(*map(torch.from_numpy, (slow, left, right, states))).numpy()
    assert np.allclose(got, states @ matrix.T, atol=1e-10)


def test_compacter_is_linear_only_where_one_factor_moves():
    rng = np.random.default_rng(0)
    sites = [[torch.from_numpy(rng.standard_normal(s)) for s in ((4, 4, 4), (4, 3), (4, 2))] for _ in WEIGHTS]

    def error(moving):
        parts = [[site[i] if i in moving else sites[0][i] for i in range(3)] for site in sites]
        matrix = partial(kronecker_sum, states=torch.eye(12, dtype=torch.float64))
        want = sum(w * matrix(*part) for w, part in zip(WEIGHTS, parts, strict=True))
        got = matrix(*(sum(w * part[i] for w, part in zip(WEIGHTS, parts, strict=True)) for i in range(3)))
        return float((got - want).norm() / want.norm())

    assert max(error({i}) for i in range(3)) < 1e-14
    assert min(error({0, 1}), error({1, 2}), error({0, 1, 2})) > 0.1


def test_reft_is_the_papers_formula():
    rng = np.random.default_rng(1)
    rotation, source, bias, states = (rng.standard_normal(shape) for shape in ((3, 8), (3, 8), 3, (2, 5, 8)))
    own = {"rotation": rotation, "source.weight": source, "source.bias": bias}
    got = _edit({name: torch.from_numpy(v).float() for name, v in own.items()}, None, (), torch.from_numpy(states))
    q, triangle = np.linalg.qr(rotation.T)
    r = (q * np.sign(np.diag(triangle))).T
    w = r + source
    assert np.allclose(r @ r.T, np.eye(3), atol=1e-12)
    assert np.allclose(got.numpy(), states + (states @ w.T + bias - states @ r.T) @ r, atol=1e-5)


def test_reft_stays_orthonormal_under_means_and_is_linear_while_the_rotation_stands():
    def edit(rotation, source):
        return torch.eye(8) + frame(rotation) @ source

    torch.manual_seed(0)
    rotations, sources = [torch.randn(3, 8) for _ in WEIGHTS], [torch.randn(3, 8) for _ in WEIGHTS]
    middle = sum(w * r for w, r in zip(WEIGHTS, rotations, strict=True))
    assert torch.allclose(frame(middle).t() @ frame(middle), torch.eye(3), atol=1e-5)
    source = sum(w * s for w, s in zip(WEIGHTS, sources, strict=True))
    both = sum(w * edit(r, s) for w, r, s in zip(WEIGHTS, rotations, sources, strict=True))
    still = sum(w * edit(rotations[0], s) for w, s in zip(WEIGHTS, sources, strict=True))
    assert (edit(rotations[0], source) - still).norm() < 1e-6 * still.norm()
    assert (edit(middle, source) - both).norm() > 0.1 * (both - torch.eye(8)).norm()


def test_peqa_scales_rows_and_leaves_biases(make, head_of):
    model, method = make("bert"), OWN["peqa"]()
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.bias.data.normal_()
    method.attach(model, head_of("bert"))
    fill(method, model, 1)
    x = torch.randn(4, 32)
    want = x @ (layer.peqa.scale[:, None] * layer.weight).t() + layer.bias
    assert torch.allclose(layer(x), want, atol=1e-5)
