"""Tiny random bases, adapters with random values everywhere, and two layers without a model around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.mixtures.crowd import INTERPRETED, ROWS, TABLES, bf16_products_of_values

from fedpeft.adapters import Adapter, AdapterSpec, make_spec
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.config import build
from fedpeft.methods import METHODS
from fedpeft.tensors import Tensors

WORDS = ["<unk>", "<pad>", "</s>", "<s>", *(f"w{i}" for i in range(60))]
HEADS = {"encoder": HeadSpec("classification", ("a", "b", "c")), "causal": HeadSpec("lm")}


def _write(folder: Path, model: Any) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny ``encoder`` (BERT) and a tiny ``causal`` model (Llama with biases)."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    small = {**sizes, "max_position_embeddings": 80, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = LlamaConfig(**small, num_key_value_heads=2, attention_bias=True)
        return {
            "encoder": _write(tmp_path_factory.mktemp("bert"), BertModel(BertConfig(**small))),
            "causal": _write(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(llama)),
        }


@pytest.fixture(scope="session")
def warm(folders: dict[str, Path]) -> Callable[..., Base]:
    """A loaded base by (name, quantization), once per session."""
    loaded: dict[tuple[str, str], Base] = {}

    def base(name: str, quantization: str = "none") -> Base:
        key = (name, quantization)
        if key not in loaded:
            loaded[key] = load_base(BaseSpec(str(folders[name]), quantization, max_tokens=32), "cpu")  # type: ignore[arg-type]
        return loaded[key]

    return base


def shaken(spec: AdapterSpec, seed: int) -> Adapter:
    flat = np.random.default_rng(seed).normal(0, 0.1, spec.layout.size).astype(np.float32)
    for entry in spec.layout.entries:
        if entry.role in ("M", "scale"):
            flat[spec.layout.spans[entry.name]] += 1
    return Adapter(spec, Tensors(spec.layout, flat))


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """An adapter of random values from (name, base, table of its method, head, seed)."""

    def make(name: str, base: Base, table: dict[str, Any], head: HeadSpec, seed: int = 0) -> Adapter:
        return shaken(make_spec(name, base, build(METHODS, table, "method"), head), seed)

    return make


@pytest.fixture(scope="session")
def head_of() -> Callable[[str], HeadSpec]:
    """The head that fits a base."""
    return HEADS.__getitem__


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """A row for each name of `ROWS`, some of them padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (len(ROWS), 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[5, 2:], mask[8, 3:], mask[6, 5:] = 0, 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def crowd(warm: Any, make_adapter: Any, head_of: Any) -> Callable[..., Any]:
    """The base, its head, and one adapter per method; on an encoder the heads differ in their number of labels."""

    def make(name: str, quantization: str = "none") -> Any:
        base = warm(name, quantization)
        wide = HeadSpec("classification", ("a", "b", "c", "d", "e"))
        heads = [head_of(name), wide if name == "encoder" else head_of(name)]
        return base, head_of(name), {key: make_adapter(key, base, table, heads[i % 2], i) for i, (key, table) in enumerate(TABLES.items())}

    return make


if INTERPRETED:

    @pytest.fixture(scope="session", autouse=True)
    def _interpreter() -> None:
        bf16_products_of_values()
