"""Tiny random shells of several families, and the two heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.bases.spec import HeadSpec

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50, "num_labels": 3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES))


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=0))


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50, num_labels=3))


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)


def _llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(_llama_config())


def _llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(_llama_config())


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**GPT2))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, d_kv=8))


MAKERS = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "llama-classifier": _llama_classifier,
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
}

Make = Callable[[str], nn.Module]


@pytest.fixture(scope="session")
def make() -> Make:
    """A fresh tiny model by name: the same weights on every call, in eval mode."""

    def build(name: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return MAKERS[name]().eval()

    return build


@pytest.fixture(scope="session")
def head_of() -> Callable[[str], HeadSpec]:
    """The head that fits a tiny model."""

    def find(name: str) -> HeadSpec:
        causal = name in ("llama", "gpt2", "t5")
        return HeadSpec("lm") if causal else HeadSpec("classification", ("a", "b", "c"))

    return find


@pytest.fixture(scope="session")
def rows() -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded."""
    ids = torch.tensor([[5, 9, 12, 33, 21, 8], [7, 3, 40, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="session")
def inputs_of(rows: dict[str, torch.Tensor]) -> Callable[[str], dict[str, torch.Tensor]]:
    """What to call a tiny model with."""

    def find(name: str) -> dict[str, torch.Tensor]:
        return rows | ({"decoder_input_ids": rows["input_ids"]} if name == "t5" else {})

    return find
