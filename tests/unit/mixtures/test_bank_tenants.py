"""Who may be in a bank: adapters come and go, the base stays as it was, and what does not fit is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.unit.mixtures.crowd import ROWS, TABLES, losses, near

from fedpeft.errors import AdapterError, BaseError, ConfigError
from fedpeft.methods import SPECS
from fedpeft.mixtures import Bank, Gates
from fedpeft.mixtures.parts import READERS

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


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
