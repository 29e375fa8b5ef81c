"""Tiny random shells of several families, the two heads, and every method on the smallest shell that it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build
from fedpeft.methods import METHODS
from fedpeft.tensors import Entry

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


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_labels")}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


MAKERS = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "llama-classifier": _llama_classifier,
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "vit": _vit,
}

Make = Callable[[str], nn.Module]


@pytest.fixture(scope="session")
def make() -> Make:
    """A fresh tiny model by name: the same weights on every call, in eval mode."""

    @lru_cache
    def first(name: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return MAKERS[name]().eval()

    return lambda name: copy.deepcopy(first(name))


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
        if name == "vit":
            return {"pixel_values": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)}
        return rows | ({"decoder_input_ids": rows["input_ids"]} if name == "t5" else {})

    return find


SMALL: dict[str, dict[str, Any]] = {"trainable-tokens": {"tokens": [5, 9]}, "adamss": {"r": 8}}
"""Settings for models 32 wide, where a default does not fit."""
MODELS = {"bitfit": "bert", "attempt": "bert", "vpt": "vit"}
"""The model of a method that does not take the tiny Llama."""
STILL = {"index", "expert"}
"""Roles that no round moves."""


@dataclass(frozen=True)
class Case:
    """A method on a tiny model."""

    kind: str
    method: Any
    model: str
    head: HeadSpec
    inputs: dict[str, torch.Tensor]
    make: Callable[[str], nn.Module]

    def attach(self, model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
        """(model, module to call)."""
        own = self.make(self.model) if model is None else model
        return own, self.method.attach(own, self.head)

    def values(self, live: nn.Module, config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        """Round-0 values."""
        found = {}
        for name, (role, p) in self.method.entries(live).items():
            first = self.method.initial(Entry(role, name, tuple(p.shape)), np.random.default_rng([seed, *name.encode()]), config)
            found[name] = p.detach().clone() if first is None else torch.from_numpy(np.asarray(first, np.float32))
        return found

    def moving(self, live: nn.Module) -> set[str]:
        """Names of what rounds move."""
        return {name for name, (role, _) in self.method.entries(live).items() if role not in STILL}

    def write(self, live: nn.Module, values: dict[str, torch.Tensor]) -> None:
        """In place, as one flat buffer does it."""
        for name, (_, p) in self.method.entries(live).items():
            p.data = values[name].clone()

    def logits(self, live: nn.Module) -> torch.Tensor:
        """In eval mode."""
        with torch.no_grad():
            return live.eval()(**self.inputs).logits


def shaken(values: dict[str, torch.Tensor], names: set[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values moved at random where ``names`` says so."""
    draw = torch.Generator().manual_seed(seed)
    return {name: v + (0.05 * torch.randn(v.shape, generator=draw) if name in names else 0) for name, v in values.items()}


@pytest.fixture(scope="session")
def shake() -> Callable[..., dict[str, torch.Tensor]]:
    """`shaken`."""
    return shaken


@pytest.fixture(scope="session")
def case_of(make: Make, head_of: Callable[[str], HeadSpec], inputs_of: Callable[[str], dict[str, torch.Tensor]]) -> Callable[[str], Case]:
    """The case of a kind of METHODS."""

    def find(kind: str) -> Case:
        model = MODELS.get(kind, "llama")
        method = build(METHODS, {"kind": kind, **SMALL.get(kind, {})}, "method")
        return Case(kind, method, model, head_of(model), inputs_of(model), make)

    return find


@pytest.fixture
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    """The case that a test is parametrised with."""
    return case_of(request.param)
