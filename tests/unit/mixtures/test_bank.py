"""Whole models: a mixed batch is every row alone, forward and backward; adapters come and go; the base is left as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.unit.mixtures.crowd import ROWS, alone, losses, near

from fedpeft.adapters import attach
from fedpeft.errors import AdapterError
from fedpeft.mixtures import Bank, Gates

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


SLOW = pytest.param("encoder", "none", 0, marks=pytest.mark.slow)
PLACES = [SLOW, ("encoder", "none", 1), ("encoder", "int8", 0), ("causal", "none", 1), ("causal", "nf4", 0)]


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
