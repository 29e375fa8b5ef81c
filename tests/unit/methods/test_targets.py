"""Roles of layers in the structures that transformers has, and refusals that name what was seen."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.methods.targets import keys_and_values, linear_roles, resolve, writers

EXPECTED = {
    "bert": ({"query", "key", "value", "attention.output.dense"}, {"intermediate.dense", "0.output.dense", "1.output.dense"}),
    "distilbert": ({"q_lin", "k_lin", "v_lin", "out_lin"}, {"lin1", "lin2"}),
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
    "gpt2": ({"c_attn", "attn.c_proj"}, {"c_fc", "mlp.c_proj"}),
    "t5": ({"SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o", "EncDecAttention.q"}, {"wi", "wo"}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_attention_and_mlp_are_told_apart(name, make):
    roles = linear_roles(make(name))
    for role, tails in zip(("attention", "mlp"), EXPECTED[name], strict=True):
        found = [module for module, given in roles.items() if given == role]
        assert all(any(module.endswith(tail) for module in found) for tail in tails)
    assert not any(part in module for module in roles for part in ("classifier", "lm_head", "embed", "pooler", "wte"))
    assert set(resolve(make(name), ("all",))) == set(roles)
    assert set(resolve(make(name), ("attention", "mlp"))) == set(roles)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("bert", "attention.output.dense", "output.dense"),
        ("llama", "o_proj", "down_proj"),
        ("gpt2", "c_proj", "c_proj"),
        ("distilbert", "out_lin", "lin2"),
        ("t5", "o", "wo"),
    ],
)
def test_writers_are_the_last_layers(name, attention, mlp, make):
    model = make(name)
    assert len(writers(model, "mlp")) == (4 if name == "t5" else 2)
    assert len(writers(model, "attention")) == (6 if name == "t5" else 2)
    assert all(found.endswith(attention) for found in writers(model, "attention"))
    assert all(found.endswith(mlp) for found in writers(model, "mlp"))


def test_keys_and_values_or_the_fused_layer(make):
    assert {name.rpartition(".")[2] for name in keys_and_values(make("bert"))} == {"key", "value"}
    assert {name.rpartition(".")[2] for name in keys_and_values(make("llama"))} == {"k_proj", "v_proj"}
    assert {name.rpartition(".")[2] for name in keys_and_values(make("gpt2"))} == {"c_attn"}


def test_suffixes_and_expressions(make):
    model = make("llama")
    assert resolve(model, ("q_proj",)) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert resolve(model, (r".*\.1\..*_proj",)) == [name for name in linear_roles(model) if ".1." in name]
    assert resolve(model, ("v_proj", "q_proj")) == resolve(model, ("q_proj", "v_proj"))


def test_a_target_that_selects_nothing_is_refused_with_what_was_seen(make):
    with pytest.raises(AdapterError, match=r"'q_proj' selects no linear layer of BertForSequenceClassification.*'query'"):
        resolve(make("bert"), ("attention", "q_proj"))
    with pytest.raises(AdapterError, match="no linear layer of Linear"):
        resolve(nn.Linear(2, 2), ("all",))


def test_naming_methods_needs_no_torch():
    code = "import sys; from fedpeft.methods import METHODS; assert not {'torch', 'peft'} & set(sys.modules); print(len(METHODS))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == str(len(METHODS))
