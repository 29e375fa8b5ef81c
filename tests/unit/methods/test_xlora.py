"""X-LoRA against a loop over layers, tokens and experts; its router saved, reloaded elsewhere, and right while generating."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, initial, load, make_spec, save
from fedpeft.bases import HeadSpec
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.methods.blends import xlora
from fedpeft.methods.blends.experts import Beside, imbalance
from fedpeft.routing.learned import learned_of
from fedpeft.tensors import Entry, Layout, Tensors

TABLE = {"kind": "xlora", "experts": ["mail", "news", "code"], "r": 3, "targets": ["q_proj", "up_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")


def drawn(method, live, seed=0):
    """Random values everywhere, by the name after the host."""
    rng = np.random.default_rng(seed)
    for _, parameter in method.entries(live).values():
        parameter.data = torch.from_numpy(rng.normal(0, 0.3, tuple(parameter.shape)).astype(np.float32))
    return {name.removeprefix("base_model.model."): p.detach() for name, (_, p) in method.entries(live).items()}


@pytest.fixture
def ids():
    return torch.randint(4, 30, (2, 7), generator=torch.Generator().manual_seed(1))


def test_it_is_the_loop_over_layers_tokens_and_experts(make, ids):
    method, model = build(METHODS, TABLE, "method"), make("llama")
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state.double()
    live = method.attach(model, HeadSpec("lm"))
    own = drawn(method, live)
    hosts = list(dict.fromkeys(name.partition(".xlora.")[0] for name in own if ".expert." in name))
    assert {name for name, p in live.named_parameters() if p.requires_grad} == {"model.xlora.router.weight", "model.xlora.router.bias"}
    seen = {}
    taps = [model.get_submodule(h).register_forward_hook(lambda _m, x, y, h=h: seen.update({h: (x[0], y)})) for h in hosts]
    with torch.no_grad():
        live(input_ids=ids)
    layout = Layout.of([Entry("router", name, tuple(value.shape)) for name, value in own.items() if ".router." in name])
    table = learned_of(Tensors.from_named(layout, {e.name: own[e.name].numpy() for e in layout.entries}), method.experts)
    scores = (hidden @ own["model.xlora.router.weight"].double().T + own["model.xlora.router.bias"].double()).view(2, 7, len(hosts), 3)
    assert np.allclose(table.shares(hidden.flatten(0, 1).float().numpy()), scores.softmax(-1).mean(2).flatten(0, 1), atol=1e-6)
    for place, host in enumerate(sorted(hosts, key=[n for n, _ in model.named_modules()].index)):
        x, y = (value.double() for value in seen[host])
        layer = model.get_submodule(host)
        for row, token in np.ndindex(2, 7):
            shares = scores[row, token, place].softmax(0)
            want = layer.weight.double() @ x[row, token]
            for share, name in zip(shares, method.experts, strict=True):
                a, b = (own[f"{host}.xlora.expert.{name}.{part}"].double() for part in "AB")
                want = want + share * (b @ (a @ x[row, token]))
            assert torch.allclose(y[row, token], want, atol=1e-4)
    for tap in taps:
        tap.remove()


def test_generating_with_a_cache_reads_the_whole_text_twice(make, ids):
    method, model = build(METHODS, TABLE, "method"), make("llama")
    live = method.attach(model, HeadSpec("lm"))
    drawn(method, live)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached, plain = (live.generate(input_ids=ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)
    with torch.no_grad():
        past = live(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(AdapterError, match="filled by another model or text"):
            live(input_ids=ids[:, :1], past_key_values=past)


def test_an_encoder_and_a_decoder_have_no_one_hidden_state(make, head_of):
    with pytest.raises(AdapterError, match="has an encoder and a decoder"):
        build(METHODS, {**TABLE, "targets": ["attention"]}, "method").attach(make("t5"), head_of("t5"))


def test_experts_are_brought_by_trained_lora_of_any_smaller_rank(make):
    mixed, found = build(METHODS, TABLE, "method"), {}
    for name, rank in (("mail", 3), ("news", 1), ("code", 2)):
        single, model = build(METHODS, {"kind": "lora", "r": rank, "targets": TABLE["targets"]}, "method"), make("llama")
        found[name] = tensors_of(single, single.attach(model, HeadSpec("lm")), seed=rank)
    live = mixed.attach(make("llama"), HeadSpec("lm"))
    before = tensors_of(mixed, live)
    after = xlora.fill(before, found)
    assert np.array_equal(after.pick({"router"}).flat, before.pick({"router"}).flat)
    named, host = after.named(), "base_model.model.model.layers.0.self_attn.q_proj"
    for name, one in found.items():
        a, b = (named[f"{host}.xlora.expert.{name}.{part}"] for part in "AB")
        theirs = one.named()
        assert np.allclose(b @ a, theirs[f"{host}.lora_B.weight"] @ theirs[f"{host}.lora_A.weight"], atol=1e-6)
    with pytest.raises(AdapterError, match="no adapter was given for expert 'code'"):
        xlora.fill(before, {"mail": found["mail"]})
    wide = build(METHODS, {"kind": "lora", "r": 4, "targets": TABLE["targets"]}, "method")
    with pytest.raises(AdapterError, match=r"expert 'mail' has shape \[4, 32\] there"):
        xlora.fill(before, {**found, "mail": tensors_of(wide, wide.attach(make("llama"), HeadSpec("lm")))})


def tensors_of(method, live, seed=0):
    drawn(method, live, seed)
    layout = Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in method.entries(live).items()])
    return Tensors.from_named(layout, {name: p.detach().numpy() for name, (_, p) in method.entries(live).items()})


def said(live, tensors):
    live.load(tensors)
    with torch.no_grad():
        return live.model(input_ids=torch.tensor([[5, 9, 11, 7]])).logits.double().sum().item()


def test_learned_routers_are_saved_and_say_the_same_on_another_base(tmp_path, shared_models):
    """In another process they do so as every method does: test_rebuild."""
    from fedpeft.bases import BaseSpec, load_base

    base, other = (load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=16), "cpu") for _ in range(2))
    for kind in ("xlora", "hydralora", "molora"):
        spec = make_spec("t", base, METHODS[kind](), HeadSpec("lm"))
        made = initial(base, spec, 0)
        moved = Tensors(spec.layout, made.tensors.flat + np.random.default_rng(0).normal(0, 0.2, spec.layout.size).astype(np.float32))
        save(Adapter(spec, moved), tmp_path / kind)
        with attach(base, spec) as live:
            here = said(live, moved)
            assert said(live, moved.patch(Tensors.zeros(spec.layout.subset({"router"})))) != pytest.approx(here, rel=1e-4)
        adapter = load(tmp_path / kind)
        with attach(other, adapter.spec) as live:
            assert said(live, adapter.tensors) == pytest.approx(here, rel=1e-6)


def test_the_balance_loss_is_one_where_tokens_spread_evenly_and_is_descended_beside_the_tasks():
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1) * 50
    weights = even.softmax(-1) * (even > 0)
    assert float(imbalance(even, weights)) == pytest.approx(12.0)
    crowded = torch.tensor([[50.0, 0, 0, 0]] * 12, dtype=torch.float64)
    assert float(imbalance(crowded, crowded.softmax(-1) * (crowded > 0))) == pytest.approx(48.0)
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values, chosen = torch.randn(6, 4, dtype=torch.float64), (logits > 0).double()
    (Beside.apply(logits * values, 0.3 * imbalance(logits, chosen)).sum()).backward()
    both = logits.grad.clone()
    logits.grad = None
    ((logits * values).sum() + 0.3 * imbalance(logits, chosen)).backward()
    assert torch.allclose(both, logits.grad)


def test_a_balanced_mixture_gives_the_same_output_and_another_router_gradient(make, ids):
    grads = []
    for balance in (0.0, 0.5):
        method, model = build(METHODS, {"kind": "molora", "r": 2, "experts": 3, "balance": balance}, "method"), make("llama")
        live = method.attach(model, HeadSpec("lm"))
        drawn(method, live)
        logits = live(input_ids=ids).logits
        logits.square().sum().backward()
        grads.append((logits.detach(), next(p.grad for name, (role, p) in method.entries(live).items() if role == "router")))
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.allclose(grads[0][1], grads[1][1])
