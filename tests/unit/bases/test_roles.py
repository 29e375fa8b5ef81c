from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    Qwen3Config,
)

from fedpeft.bases import module_roles


def ends(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("config", "attention", "mlp", "head", "outside"),
    [
        (BertConfig(num_hidden_layers=2), {"query", "key", "value", "dense"}, {"dense"}, ["classifier"], {"dense"}),
        (DistilBertConfig(n_layers=2), {"q_lin", "k_lin", "v_lin", "out_lin"}, {"lin1", "lin2"}, ["pre_classifier", "classifier"], set()),
        (
            DebertaV2Config(num_hidden_layers=2),
            {"query_proj", "key_proj", "value_proj", "dense"},
            {"dense"},
            ["pooler", "classifier"],
            set(),
        ),
        (MPNetConfig(num_hidden_layers=2), {"q", "k", "v", "o"}, {"dense"}, ["classifier"], set()),
        (GPT2Config(n_layer=2), {"c_attn", "c_proj"}, {"c_fc", "c_proj"}, ["score"], set()),
        (
            LlamaConfig(num_hidden_layers=2),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
            {"gate_proj", "up_proj", "down_proj"},
            ["score"],
            set(),
        ),
        (
            Qwen3Config(num_hidden_layers=2),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
            {"gate_proj", "up_proj", "down_proj"},
            ["score"],
            set(),
        ),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else "",
)
def test_roles_are_found_by_structure(config: object, attention: set[str], mlp: set[str], head: list[str], outside: set[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    roles = module_roles(model)
    assert (ends(roles["attention"]), ends(roles["mlp"]), roles["head"], ends(roles["outside"])) == (attention, mlp, head, outside)
    assert len(roles["attention"]) % 2 == 0
    assert not set(roles["attention"]) & set(roles["mlp"])


def test_the_lm_head_is_a_head() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))
    assert module_roles(model)["head"] == ["lm_head"]
