"""Tiny random bases (an encoder and a causal model), and every method that METHODS lists in a small setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.methods import METHODS
from fedpeft.methods.protocol import Method
from fedpeft.tensors import Tensors

LABELS, LM = HeadSpec("classification", ("a", "b", "c")), HeadSpec("lm")
WORDS = ["<unk>", "<pad>", "</s>", "<s>", *(f"w{i}" for i in range(60))]
SMALL: dict[str, dict[str, Any]] = {
    "core": {"r": 4},
    "lora": {"r": 4, "targets": ("all",)},
    "prompt": {"tokens": 5},
    "prefix": {"tokens": 5},
    "bottleneck": {"dim": 8},
}
KINDS = ("lora", "core", "ia3", "bitfit", "prompt", "prefix", "bottleneck")
"""One of each form; the catalogue's own suite runs every method."""
VARIANTS: dict[str, Method] = {kind: METHODS[kind](**SMALL.get(kind, {})) for kind in KINDS} | {
    "rslora": METHODS["lora"](r=4, rslora=True),  # type: ignore[call-arg]
    "dora": METHODS["lora"](r=4, targets=("all",), dora=True),  # type: ignore[call-arg]
}


PLACES = {"encoder": ("encoder", LABELS), "causal-classes": ("causal", LABELS), "causal-lm": ("causal", LM)}
# A causal classifier reads the last token, which peft cannot find behind a prompt in a padded batch; the method refuses.
REFUSED = {("prompt", "causal-classes")}
Placed = tuple[Method, str, HeadSpec]


def write_model(folder: Path, model: Any) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=64
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny ``encoder`` (BERT) and a tiny ``causal`` model (Llama)."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    small = {**sizes, "max_position_embeddings": 80, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3}
    return {
        "encoder": write_model(tmp_path_factory.mktemp("bert"), BertModel(BertConfig(**small))),
        "causal": write_model(
            tmp_path_factory.mktemp("llama"), LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=4, attention_bias=True))
        ),
    }


@pytest.fixture(scope="session")
def warm(folders: dict[str, Path]) -> Callable[..., Base]:
    """A loaded base by (name, quantization); loaded once per session, as a worker does."""
    loaded: dict[tuple[str, str], Base] = {}

    def base(name: str, quantization: str = "none") -> Base:
        key = (name, quantization)
        if key not in loaded:
            loaded[key] = load_base(BaseSpec(str(folders[name]), quantization, max_tokens=32), "cpu")  # type: ignore[arg-type]
        return loaded[key]

    return base


@pytest.fixture(autouse=True)
def _nothing_stays_attached(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "warm" in request.fixturenames:
        warm = request.getfixturevalue("warm")
        assert warm("encoder").holder is None
        assert warm("causal").holder is None


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Two rows, the second padded at its end."""
    import torch

    ids = torch.tensor([[3, 10, 11, 12, 13], [3, 20, 21, 1, 1]])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


@pytest.fixture(params=sorted(VARIANTS))
def method(request: pytest.FixtureRequest) -> Method:
    """Each method in turn, and LoRA's two variants."""
    return VARIANTS[request.param]


@pytest.fixture(params=[f"{kind}:{place}" for kind in sorted(VARIANTS) for place in PLACES if (kind, place) not in REFUSED])
def placed(request: pytest.FixtureRequest) -> Placed:
    """Each method on each base and head that it takes: (method, name of the base, head)."""
    kind, _, place = request.param.partition(":")
    return (VARIANTS[kind], *PLACES[place])


@pytest.fixture
def lora() -> Method:
    return VARIANTS["lora"]


@pytest.fixture
def shaken() -> Callable[[AdapterSpec, int], Adapter]:
    """An adapter with random values everywhere, so that every tensor matters."""

    def make(spec: AdapterSpec, seed: int = 0) -> Adapter:
        flat = np.random.default_rng(seed).normal(0, 0.1, spec.layout.size).astype(np.float32)
        for entry in spec.layout.entries:
            if entry.role in ("M", "scale"):
                flat[spec.layout.spans[entry.name]] += 1
        return Adapter(spec, Tensors(spec.layout, flat))

    return make
