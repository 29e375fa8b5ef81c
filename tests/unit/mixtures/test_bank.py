"""Whole models: a mixed batch is every row alone, forward and backward; adapters come and go; the base is left as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import attach
from fedpeft.bases import HeadSpec
from fedpeft.errors import AdapterError, BaseError, ConfigError
from fedpeft.methods import SPECS
from fedpeft.mixtures import Bank, Gates
from fedpeft.mixtures.parts import READERS

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

TABLES = {
    "wide": {"kind": "lora", "r": 4, "targets": ["all"]},
    "twin": {"kind": "lora", "r": 4, "targets": ["all"]},
    "rs": {"kind": "lora", "r": 3, "rslora": True},
    "two": {"kind": "lora", "r": 2, "extra": 2},
    "gain": {"kind": "ia3"},
    "bias": {"kind": "bitfit"},
    "bottle": {"kind": "bottleneck", "dim": 5},
    "prompt": {"kind": "prompt", "tokens": 3},
    "longer": {"kind": "prompt", "tokens": 5},
    "prefix": {"kind": "prefix", "tokens": 4},
    "hydra": {"kind": "hydralora", "r": 3, "experts": 3, "targets": ["all"]},
    "moe": {"kind": "molora", "r": 2, "experts": 3, "top": 2},
}
ROWS = ["wide", "gain", "rs", None, "bottle", "prompt", "bias", "twin", "prefix", "wide", "longer", "two", "hydra", "moe", "hydra"]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (len(ROWS), 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[5, 2:], mask[8, 3:], mask[6, 5:] = 0, 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def crowd(warm, make_adapter, head_of):
    """The base, its head, and one adapter per method; on an encoder the heads differ in their number of labels."""

    def make(name, quantization="none"):
        base = warm(name, quantization)
        wide = HeadSpec("classification", ("a", "b", "c", "d", "e"))
        heads = [head_of(name), wide if name == "encoder" else head_of(name)]
        return base, head_of(name), {key: make_adapter(key, base, table, heads[i % 2], i) for i, (key, table) in enumerate(TABLES.items())}

    return make


def losses(logits):
    return [row[torch.isfinite(row)].square().mean() for row in logits]


def alone(base, adapters, batch):
    """Logits of every row under its own adapter alone, and the gradients of each adapter."""
    logits, grads = {}, {}
    for name, adapter in adapters.items():
        rows = [i for i, row in enumerate(ROWS) if row == name]
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            out = live.model(**{key: value[rows] for key, value in batch.items()}).logits
            sum(losses(out)).backward()
            logits |= {row: part.detach() for row, part in zip(rows, out, strict=True)}
            grads[name] = live.grad.clone()
    return logits, grads


def near(found, wanted, tolerance=1e-5):
    assert float((found.detach() - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


PLACES = [("encoder", "none", 0), ("encoder", "none", 1), ("encoder", "int8", 0), ("causal", "none", 1), ("causal", "nf4", 0)]


@pytest.mark.parametrize(("name", "quantization", "dense"), PLACES)
def test_a_mixed_batch_is_each_row_alone(crowd, batch, name, quantization, dense):
    base, head, adapters = crowd(name, quantization)
    wanted, grads = alone(base, adapters, batch)
    with Bank.attach(base, head, adapters, dense=bool(dense)) as bank:
        bank.use(Gates.rows(ROWS))
        logits = bank.model(**batch).logits
        sum(loss for row, loss in enumerate(losses(logits)) if ROWS[row]).backward()
        for row, part in wanted.items():
            near(logits[row][..., : part.shape[-1]], part)
            assert bool((logits[row][..., part.shape[-1] :] == -torch.inf).all())
        for task in adapters:
            near(bank.grad(task), grads[task])
        if name == "encoder":
            assert bank.logits(logits, "twin").shape == (1, 5)
            assert torch.equal(bank.logits(logits, "wide"), logits[[0, 9], :3])


def dense_twin(base):
    """The 4-bit base, its layers unpacked once and for all."""
    from bitsandbytes.functional import dequantize_4bit

    model = copy.deepcopy(base.model)
    for name, layer in list(model.named_modules()):
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            twin = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            twin.weight.data, twin.bias = dequantize_4bit(layer.weight.data, layer.weight.quant_state), layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, twin)
    return replace(base, model=model.requires_grad_(False), trunk=model.model)


def test_four_bit_layers_are_multiplied_with_their_adapters_and_never_kept_dense(crowd, batch, monkeypatch):
    base, head, every = crowd("causal", "nf4")
    adapters, found, kept = {name: every[name] for name in ("wide", "twin", "rs")}, [], []
    rows = [name if name in adapters else None for name in ROWS]
    for model, way in ((dense_twin(base), "loop"), (base, "auto")):
        with Bank.attach(model, head, adapters, way=way) as bank, monkeypatch.context() as patch:
            patch.setattr("bitsandbytes.matmul_4bit", None)
            bank.use(Gates.rows(rows))
            with torch.autograd.graph.saved_tensors_hooks(lambda t, model=model: kept.append((id(model), t.shape)) or t, lambda t: t):
                logits = bank.model(**batch).logits
            sum(losses(logits)).backward()
            found.append((logits, torch.cat([bank.grad(name) for name in adapters])))
            patch.undo()
            with torch.no_grad():  # by the layers' own kernels
                near(bank.model(**batch).logits, logits.detach())
    near(found[1][0], found[0][0].detach())
    near(found[1][1], found[0][1])
    assert (id(base), torch.Size([len(ROWS), 6, 32])) in kept
    assert (id(base), torch.Size([32, 32])) not in kept


def test_under_autocast_answers_and_gradients_are_nearly_the_same(crowd, batch):
    base, head, every = crowd("causal")
    adapters, found = {name: every[name] for name in ("wide", "gain", "bias", "bottle")}, []
    with Bank.attach(base, head, adapters) as bank:
        bank.use(Gates.rows([name if name in adapters else None for name in ROWS]))
        for autocast in (False, True):
            bank.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = bank.model(**batch).logits.float()
            sum(losses(logits)).backward()
            found.append((logits.detach(), torch.cat([bank.grad(name) for name in adapters])))
    near(found[1][0], found[0][0], 3e-2)
    near(found[1][1], found[0][1], 1e-1)
    assert not torch.equal(found[1][0], found[0][0])


def test_the_base_answers_rows_without_an_adapter(crowd, batch):
    base, head, adapters = crowd("causal")
    plain = base.shell(head)(**batch).logits
    with Bank.attach(base, head, adapters) as bank:
        near(bank.model(**batch).logits, plain)
        bank.use(Gates.rows(ROWS))
        near(bank.model(**batch).logits[ROWS.index(None)], plain[ROWS.index(None)])


def test_the_shared_adapter_acts_on_every_row_and_adds_up(warm, make_adapter, head_of, batch):
    base, head = warm("causal"), head_of("causal")
    one, two = (make_adapter(name, base, {"kind": "lora", "r": r}, head, r) for name, r in (("one", 2), ("two", 3)))
    with Bank.attach(base, head, {"one": one, "two": two}) as bank:
        bank.use(Gates.rows(["one"] * len(ROWS)) + Gates.rows(["two"] * len(ROWS)))
        both = bank.model(**batch).logits.detach()
    with Bank.attach(base, head, {"two": two}, shared=one) as bank:
        bank.use(Gates.rows(["two"] * len(ROWS)))
        near(bank.model(**batch).logits, both)


def test_adapters_may_act_on_different_layers_of_one_input(warm, make_adapter, head_of, batch):
    base, head = warm("causal"), head_of("causal")
    adapters = {name: make_adapter(name, base, {"kind": "lora", "r": 2, "targets": [name]}, head) for name in ("q_proj", "v_proj")}
    rows = ["q_proj", "v_proj"]
    inputs = {key: value[:2] for key, value in batch.items()}
    wanted = []
    for row, name in enumerate(rows):
        with attach(base, adapters[name].spec) as live:
            live.load(adapters[name].tensors)
            wanted.append(live.model(**{key: value[[row]] for key, value in inputs.items()}).logits[0].detach())
    with Bank.attach(base, head, adapters) as bank:
        bank.use(Gates.rows(rows))
        near(bank.model(**inputs).logits, torch.stack(wanted))


def test_checkpoints_recompute_under_the_same_gates(crowd, batch):
    base, head, adapters = crowd("causal")
    rows, found = [None if name == "prefix" else name for name in ROWS], []
    for recompute in (False, True):
        with Bank.attach(base, head, adapters) as bank:
            bank.model.train()
            if recompute:
                bank.model.activation_checkpointing_enable()
            try:
                bank.use(Gates.rows(rows))
                sum(losses(bank.model(**batch, use_cache=False).logits)).backward()
                found.append(torch.cat([bank.grad(name) for name in adapters]))
                if recompute:
                    bank.use(Gates.rows(ROWS))
                    with pytest.raises(AdapterError, match="checkpointing drops the cache that holds prefixes"):
                        bank.model(**batch, use_cache=False)
            finally:
                bank.model.activation_checkpointing_disable()
    near(found[1], found[0])


def test_text_is_generated_as_by_recomputing_every_token(crowd, batch):
    base, head, adapters = crowd("causal")
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    with Bank.attach(base, head, adapters) as bank, torch.no_grad():
        bank.use(Gates.rows(ROWS))
        said = bank.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for step in range(4):
            whole = said.sequences[:, : ids.shape[1] + step]
            near(said.logits[step], bank.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[:, -1])


def test_virtual_tokens_act_on_whole_rows(crowd, batch):
    base, head, adapters = crowd("causal")
    with Bank.attach(base, head, adapters) as bank:
        for gates in (Gates.weights(["prompt"], torch.full((2, 1), 0.5)), Gates.tokens(["prefix"], torch.full((2, 3, 1), 0.5))):
            with pytest.raises(AdapterError, match="acts on whole rows, with weight 0 or 1; name its adapter"):
                bank.use(gates)
        with pytest.raises(AdapterError, match="a prefix acts on whole rows, which no layer's router can choose"):
            bank.use(Gates.routed({}, ["prefix"], 1))
        bank.use(Gates.rows(["prompt"]))
        with pytest.raises(AdapterError, match="cannot be packed"):
            bank.model(input_ids=batch["input_ids"][:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_a_shared_prompt_comes_before_each_rows_own(warm, make_adapter, head_of, batch):
    base, head = warm("causal"), head_of("causal")
    one, two = (make_adapter(name, base, {"kind": "prompt", "tokens": n}, head, n) for name, n in (("one", 2), ("two", 3)))
    with Bank.attach(base, head, {"one": one, "two": two}) as bank:
        bank.use(Gates.rows(["one"] * len(ROWS)) + Gates.rows(["two"] * len(ROWS)))
        both = bank.model(**batch).logits.detach()
    with Bank.attach(base, head, {"two": two}, shared=one) as bank:
        bank.use(Gates.rows(["two"] * len(ROWS)))
        near(bank.model(**batch).logits, both)
        assert not torch.allclose(bank.model(**batch).logits, base.model.lm_head(base.trunk.embed_tokens(batch["input_ids"])))


def test_every_parameter_of_a_dense_bank_gets_a_gradient(crowd, batch):
    for name in ("encoder", "causal"):
        base, head, adapters = crowd(name)
        with Bank.attach(base, head, adapters, dense=True) as bank:
            for task in adapters:
                for parameter in bank.parameters(task).values():
                    parameter.grad = None
            bank.use(Gates.rows(["wide"] * len(ROWS)))
            sum(losses(bank.model(**batch).logits)).backward()
            own = {id(p) for task in adapters for p in bank.parameters(task).values()}
            assert own == {id(p) for p in bank.model.parameters() if p.requires_grad}
            for task in adapters:
                gradients = [p.grad for p in bank.parameters(task).values()]
                assert all(gradient is not None for gradient in gradients)
                assert any(bool(gradient.any()) for gradient in gradients) == (task == "wide")


def test_values_that_an_engine_moved_are_read_and_used(crowd, batch):
    base, head, adapters = crowd("causal")
    with Bank.attach(base, head, adapters, dense=True) as bank:
        bank.use(Gates.rows(ROWS))
        wanted = bank.model(**batch).logits.detach()
        for task in adapters:
            for parameter in bank.parameters(task).values():
                parameter.data = parameter.data.clone()
        bank.store.slabs[0].values.zero_()
        near(bank.model(**batch).logits, wanted)
        np.testing.assert_array_equal(bank.read("wide").flat, adapters["wide"].tensors.flat)


def test_adapters_come_and_go_while_the_others_stay(crowd, batch):
    base, head, adapters = crowd("encoder")
    late = adapters.pop("twin")
    with Bank.attach(base, head, adapters) as bank:
        views = {name: bank.flat(name) for name in adapters}
        bank.put("late", late)
        bank.use(Gates.rows(["late"] * len(ROWS)))
        first = bank.model(**batch).logits.detach()
        bank.remove("wide")
        bank.use(Gates.rows(["late"] * len(ROWS)))
        assert torch.equal(bank.model(**batch).logits, first)
        bank.put("late", adapters["gain"])
        bank.use(Gates.rows(["late"] * len(ROWS)))
        second = bank.model(**batch).logits.detach()
        bank.use(Gates.rows(["gain"] * len(ROWS)))
        assert torch.equal(bank.model(**batch).logits, second)
        for name in set(adapters) - {"wide"}:
            assert views[name].data_ptr() == bank.flat(name).data_ptr()
            np.testing.assert_array_equal(bank.read(name).flat, adapters[name].tensors.flat)
        with pytest.raises(AdapterError, match="no adapter 'wide' is attached; attached are"):
            bank.use(Gates.rows(["wide"]))


def photo(base):
    state = {name: value.clone() for name, value in base.model.state_dict().items()}
    facts = [(name, id(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for name, m in base.model.named_modules()]
    return state, facts, [(name, p.requires_grad, p.data_ptr()) for name, p in base.model.named_parameters()]


@pytest.mark.parametrize("dense", [False, True])
def test_the_base_is_as_before(crowd, batch, dense):
    base, head, adapters = crowd("causal")
    before = photo(base)
    with Bank.attach(base, head, adapters, dense=dense) as bank:
        with pytest.raises(BaseError, match=f"mixture of {len(TABLES)} adapters"):
            base.shell(head)
        bank.model.train()
        bank.use(Gates.rows(ROWS))
        bank.model(**batch).logits.sum().backward()
        bank.detach()
        bank.detach()
    after = photo(base)
    assert before[1:] == after[1:]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert base.holder is None


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"kind": "lora", "dora": True}, "DoRA cannot be mixed"),
        ({"kind": "core"}, r"core cannot be mixed in one batch; a mixture takes \['bitfit', 'bottleneck'"),
        ({"kind": "molora", "balance": 0.1}, r"molora with balance = 0.1 cannot be mixed"),
        ({"kind": "loha"}, "loha cannot be mixed"),
        ({"kind": "vera"}, "vera cannot be mixed"),
    ],
)
def test_other_methods_are_refused_by_name(warm, make_adapter, head_of, table, reason):
    base, head = warm("causal"), head_of("causal")
    fine, odd = make_adapter("fine", base, {"kind": "lora"}, head), make_adapter("odd", base, table, head)
    with pytest.raises(AdapterError, match=reason):
        Bank.attach(base, head, {"fine": fine, "odd": odd})
    assert base.holder is None
    assert not any("forward" in vars(module) for module in base.model.modules())
    with Bank.attach(base, head, {"fine": fine}) as bank:
        with pytest.raises(AdapterError, match=reason):
            bank.put("fine", odd)
        assert bank.names == ("fine",)


def test_what_does_not_fit_is_said(warm, make_adapter, head_of, crowd, batch):
    base, head, adapters = crowd("causal")
    with pytest.raises(ConfigError, match="way 'fast' is unknown"):
        Bank.attach(base, head, adapters, way="fast")
    with pytest.raises(ConfigError, match="way 'fused' needs CUDA and triton, this base is on cpu"):
        Bank.attach(base, head, adapters, way="fused")
    with pytest.raises(AdapterError, match="a classification head, this mixture a lm one"):
        Bank.attach(base, head, {"x": make_adapter("x", base, {"kind": "lora"}, head_of("encoder"))})
    with Bank.attach(base, head, adapters) as bank:
        bank.use(Gates.rows(["wide", "gain"]))
        with pytest.raises(AdapterError, match="tokens, the gates are for 2 rows"):
            bank.model(input_ids=batch["input_ids"][:3, :5])
        with pytest.raises(AdapterError, match=r"terms are for \[1, 2\] rows"):
            bank.use(Gates.rows(["wide", "gain"]) + Gates.rows(["wide"]))
        with pytest.raises(AdapterError, match="in a dense bank only"):
            bank.parameters("wide")
    with pytest.raises(AdapterError, match=r"weights have shape \[2, 3\]; they must be \(B, E\) with E = 2"):
        Gates.weights(["a", "b"], torch.ones(2, 3))
    with pytest.raises(AdapterError, match="k is 2; choose from 1"):
        Gates.routed({}, ["a"], 2)
    with pytest.raises(AdapterError, match="name one or more different ones"):
        Gates.tokens(["a", "a"], torch.ones(1, 1, 2))


def test_learned_weights_of_one_are_rows_for_every_method(crowd, batch):
    base, head, adapters = crowd("causal")
    names = ["gain", "bias", "bottle", "wide", "rs"]
    picks = [names[row % len(names)] for row in range(len(ROWS))]
    w = torch.nn.functional.one_hot(torch.tensor([names.index(pick) for pick in picks]), len(names)).float().requires_grad_()
    found = []
    for gates in (Gates.rows(picks), Gates.weights(names, w)):
        with Bank.attach(base, head, adapters) as bank:
            bank.use(gates)
            logits = bank.model(**batch).logits
            sum(losses(logits)).backward()
            found.append((logits.detach(), torch.cat([bank.grad(name) for name in names])))
    near(found[1][0], found[0][0])
    near(found[1][1], found[0][1])
    assert bool(w.grad.abs().sum(0).all())


def test_frozen_adapters_get_no_gradient(crowd, batch):
    base, head, adapters = crowd("causal")
    with Bank.attach(base, head, adapters) as bank:
        bank.train(["wide"])
        bank.use(Gates.rows(ROWS))
        sum(losses(bank.model(**batch).logits)).backward()
        assert bool(bank.grad("wide").any())
        assert not any(bool(bank.grad(name).any()) for name in set(adapters) - {"wide", "twin"})


def test_the_facts_of_methods_name_what_can_be_mixed():
    assert all(SPECS[kind].mixed_batch for kind in READERS)
