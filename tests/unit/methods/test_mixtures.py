"""What mixtures, fusions and prompts made of prompts compute, against slow loops over experts in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.methods.blends import fusion, prompts, spec_of
from fedpeft.methods.blends.experts import top_weights
from fedpeft.methods.blends.gated import prefix_attention
from fedpeft.methods.blends.prompting import mixture
from fedpeft.tensors import Entry, Layout, Tensors

TABLES = {
    "unipelt": {"kind": "unipelt", "r": 4, "tokens": 3, "dim": 5},
    "adapterfusion": {"kind": "adapterfusion", "dim": 5, "experts": ["mail", "news", "code"]},
    "mpt": {"kind": "mpt", "tokens": 3},
    "attempt": {"kind": "attempt", "tokens": 3, "dim": 4},
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


def chosen(live, method, host, mark):
    found = {
        name.partition(f".{mark}.")[2]: p.detach().double() for name, (_, p) in method.entries(live).items() if f".{host}.{mark}." in name
    }
    assert found
    return found


@pytest.mark.parametrize(("kind", "top"), [("hydralora", 3), ("molora", 3), ("molora", 2), ("molora", 1)])
def test_expert_mixtures_are_the_loop_over_experts(kind, top, make, head_of):
    settings = {"top": top} if kind == "molora" else {}
    method = build(METHODS, {"kind": kind, "r": 2, "experts": 3, "targets": ["query"], **settings}, "method")
    model = make("bert")
    live = method.attach(model, head_of("bert"))
    start(method, live, model.config, noise=0.5)
    host = model.bert.encoder.layer[1].attention.self.query
    own = chosen(live, method, "layer.1.attention.self.query", kind)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    got = host(x)
    for row in range(2):
        for place in range(5):
            states = x[row, place].double()
            scores = own["router"] @ states
            kept = scores.sort(descending=True).indices[:top]
            shares = {int(e): float((scores[e] - scores[kept].logsumexp(0)).exp()) for e in kept}
            want = host.weight.double() @ states + host.bias.double()
            for e, share in shares.items():
                want = want + share * own[f"B.{e}"] @ ((own["A"] if kind == "hydralora" else own[f"A.{e}"]) @ states)
            assert torch.allclose(got[row, place].double(), want, atol=1e-4)


def test_fusion_is_the_attention_over_its_experts(make, head_of):
    method = build(METHODS, TABLES["adapterfusion"], "method")
    model = make("bert")
    live = method.attach(model, head_of("bert"))
    start(method, live, model.config)
    rng = torch.Generator().manual_seed(1)
    for _, parameter in method.entries(live).values():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3
    host = model.bert.encoder.layer[0].output.dense
    own = chosen(live, method, "layer.0.output.dense", "adapterfusion")
    x = torch.randn(3, 64, generator=rng)
    got = host(x)
    for row in range(3):
        y = host.weight.double() @ x[row].double() + host.bias.double()
        answers = []
        for name in method.experts:
            part = {key.removeprefix(f"expert.{name}."): value for key, value in own.items() if key.startswith(f"expert.{name}.")}
            inner = torch.nn.functional.gelu(part["down.weight"] @ y + part["down.bias"])
            answers.append(part["up.weight"] @ inner + part["up.bias"])
        scores = torch.stack([(own["query"] @ y) @ (own["key"] @ answer) for answer in answers]).softmax(0)
        want = y + sum(share * (own["value"] @ answer) for share, answer in zip(scores, answers, strict=True))
        assert torch.allclose(got[row].double(), want, atol=1e-4)


def test_experts_are_brought_by_trained_bottlenecks_and_frozen(make, head_of):
    fused, single = build(METHODS, TABLES["adapterfusion"], "method"), build(METHODS, {"kind": "houlsby", "dim": 5}, "method")
    trained = {}
    for seed, name in enumerate(fused.experts):
        model = make("bert")
        live = single.attach(model, head_of("bert"))
        start(single, live, model.config, noise=0.1, seed=seed)
        trained[name] = read(single, live)
    model = make("bert")
    live = fused.attach(model, head_of("bert"))
    start(fused, live, model.config)
    before = read(fused, live)
    after = fusion.fill(before, trained)
    kept = before.layout.roles - {"expert", "value"}
    assert np.array_equal(after.pick(kept).flat, before.pick(kept).flat)
    assert all(np.array_equal(value, np.eye(32)) for value in after.pick({"value"}).named().values())
    news = trained["news"].named()["base_model.model.bert.encoder.layer.1.output.dense.houlsby.up.weight"]
    assert np.array_equal(after.named()["base_model.model.bert.encoder.layer.1.output.dense.adapterfusion.expert.news.up.weight"], news)
    frozen = [p for role, p in fused.entries(live).values() if role == "expert"]
    assert frozen
    assert not any(p.requires_grad for p in frozen)
    with pytest.raises(AdapterError, match="no adapter was given for expert 'code'"):
        fusion.fill(before, {"mail": trained["mail"]})
    pfeiffer = build(METHODS, {"kind": "pfeiffer", "dim": 5}, "method")
    model = make("bert")
    live = pfeiffer.attach(model, head_of("bert"))
    start(pfeiffer, live, model.config)
    with pytest.raises(AdapterError, match="has no bottleneck there; set method"):
        fusion.fill(before, dict.fromkeys(fused.experts, read(pfeiffer, live)))


def test_no_round_moves_an_expert():
    from fedpeft.schemes import SCHEMES

    layout = Layout.of([Entry("expert", "e", (2,)), Entry("query", "q", (2,))])
    assert "expert" not in SCHEMES["fedavg"]().phase(1, layout).moves
    assert "query" in SCHEMES["fedavg"]().phase(1, layout).moves


@given(st.integers(1, 4), st.integers(0, 10_000))
def test_top_weights_are_a_distribution_over_the_best(top, seed):
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = top_weights(scores, top)
    assert torch.allclose(weights.sum(-1), torch.ones(6, dtype=torch.float64))
    assert ((weights > 0).sum(-1) == top).all()
    for row, weight in zip(scores, weights, strict=True):
        assert row[weight > 0].min() >= row[weight == 0].max() if top < 4 else True


def test_a_prefix_of_its_own_softmax_is_attention_per_head():
    rng = torch.Generator().manual_seed(0)
    queries, keys, held = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((2, 3, 8), (2, 5, 4), (2, 5, 4)))
    got = prefix_attention(queries, keys, held)
    for head in range(2):
        cut = slice(4 * head, 4 * head + 4)
        shares = (queries[..., cut] @ keys[head].t() / 2.0).softmax(-1)
        assert torch.allclose(got[..., cut], shares @ held[head])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_unipelt_without_gates_is_its_parts(name, make, head_of, inputs_of):
    """All gates shut: the base. And a row's answer does not depend on the rows and tokens beside it."""
    method, model = build(METHODS, TABLES["unipelt"], "method"), make(name)
    before = logits(model, inputs_of(name))
    live = method.attach(model, head_of(name))
    start(method, live, model.config, noise=0.3)
    ids = torch.tensor([[7, 3, 40, 2]])
    alone, beside = logits(live, {"input_ids": ids}), logits(live, inputs_of(name))[1:]
    assert torch.allclose(beside[:, :4] if beside.dim() == 3 else beside, alone, atol=1e-5)
    for key, (role, parameter) in method.entries(live).items():
        if role == "gate":
            parameter.data = torch.full_like(parameter, -1e4 if key.endswith("bias") else 0.0)
    assert torch.allclose(logits(live, inputs_of(name)), before, atol=2e-6)


def test_a_later_token_changes_no_earlier_answer_of_unipelt(make, head_of):
    method, model = build(METHODS, TABLES["unipelt"], "method"), make("llama")
    live = method.attach(model, head_of("llama"))
    start(method, live, model.config, noise=0.3)
    one, two = (logits(live, {"input_ids": torch.tensor([[7, 3, 40, last]])}) for last in (2, 9))
    assert torch.allclose(one[:, :3], two[:, :3], atol=1e-6)


def test_unipelt_says_where_a_prefix_is_impossible():
    from transformers import FalconConfig, FalconForCausalLM

    falcon = FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50))
    with pytest.raises(AdapterError, match=r"no query layer of its own.*set method.tokens = 0"):
        build(METHODS, TABLES["unipelt"], "method").attach(falcon, HeadSpec("lm"))
    without = build(METHODS, {**TABLES["unipelt"], "tokens": 0}, "method")
    without.detach(without.attach(falcon, HeadSpec("lm")))


def test_mpt_is_the_product_prompt(make, inputs_of):
    method, plain, model = build(METHODS, TABLES["mpt"], "method"), build(METHODS, {"kind": "prompt", "tokens": 3}, "method"), make("llama")
    live = method.attach(model, HeadSpec("lm"))
    start(method, live, model.config, noise=0.5)
    named = read(method, live).named()
    got = logits(live, inputs_of("llama"))
    product = named["prompt_embeddings"] * (named["prompt_embeddings.row"] @ named["prompt_embeddings.column"])
    other = plain.attach(make("llama"), HeadSpec("lm"))
    for _, parameter in plain.entries(other).values():
        parameter.data = torch.from_numpy(product)
    assert torch.allclose(got, logits(other, inputs_of("llama")), atol=1e-5)


def test_attempt_mixes_its_sources_by_the_row(make, head_of, inputs_of):
    method, model = build(METHODS, TABLES["attempt"], "method"), make("bert")
    live = method.attach(model, head_of("bert"))
    start(method, live, model.config, noise=0.5)
    rng = np.random.default_rng(0)
    sources = {}
    for name in method.sources:
        layout = Layout.of([Entry("prompt", "prompt_embeddings", (3, 32))])
        sources[name] = Tensors(layout, rng.standard_normal(96).astype(np.float32))
    filled = prompts.fill(read(method, live), sources)
    write(method, live, filled)
    named, inputs = {name: torch.from_numpy(value).double() for name, value in filled.named().items()}, inputs_of("bert")
    seen = live.inner.get_prompt
    caught = []
    live.inner.get_prompt = lambda batch_size, **rest: caught.append(seen(batch_size, **rest)) or caught[-1]
    both = logits(live, inputs)
    for row, ids in enumerate(((5, 9, 12, 33, 21, 8), (7, 3, 40, 2))):
        x = model.get_input_embeddings().weight[list(ids)].double().amax(0)
        inner = named["prompt_embeddings.up.weight"] @ torch.nn.functional.silu(named["prompt_embeddings.down.weight"] @ x)
        norm = (inner - inner.mean()) / (inner.var(unbiased=False) + 1e-5).sqrt()
        wanted = norm * named["prompt_embeddings.norm.weight"] + named["prompt_embeddings.norm.bias"]
        every = [*(named[f"prompt_embeddings.sources.{name}"] for name in method.sources), named["prompt_embeddings"]]
        shares = torch.stack([prompt.amax(0) @ wanted / 32**0.5 for prompt in every]).softmax(0)
        want = named["prompt_embeddings"] + sum(share * prompt for share, prompt in zip(shares, every, strict=True))
        assert torch.allclose(caught[0][row].double(), want, atol=1e-4)
    alone = logits(live, {"input_ids": torch.tensor([[7, 3, 40, 2]]), "attention_mask": torch.ones(1, 4)})
    assert torch.allclose(both[1:], alone, atol=1e-5)
    with pytest.raises(AdapterError, match="source 'second' holds no prompt"):
        prompts.fill(filled, {"first": sources["first"], "second": Tensors.zeros(Layout.of([Entry("A", "a", (2,))]))})
    with pytest.raises(AdapterError, match=r"needs input_ids"):
        live(inputs_embeds=torch.zeros(1, 2, 32), input_ids=None)


def test_one_source_and_equal_prompts_mix_to_their_double():
    prompt = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(mixture(prompt, [prompt, prompt], torch.randn(2, 4, dtype=torch.float64), 1.0)[1], 2 * prompt)


def test_attempt_refuses_what_would_read_the_answer(make):
    with pytest.raises(AdapterError, match="hold the answer"):
        build(METHODS, "attempt", "method").attach(make("llama"), HeadSpec("lm"))
