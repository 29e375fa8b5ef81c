"""Adapters of every family without a model, with random values; and one tiny causal model for what peft must read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases import HeadSpec
from fedpeft.methods import METHODS
from fedpeft.tensors import Entry, Layout, Tensors

OUT, INNER = 7, 10
MODULES = ("base_model.model.x.q_proj", "base_model.model.x.v_proj")
LABELS = HeadSpec("classification", ("no", "yes"))


def lora_entries(r: int, extra: int) -> list[Entry]:
    found = []
    for m in MODULES:
        found += [Entry("A", f"{m}.lora_A.weight", (r, INNER)), Entry("B", f"{m}.lora_B.weight", (OUT, r))]
        if extra:
            found += [Entry("A2", f"{m}.lora_A2.weight", (extra, INNER)), Entry("B2", f"{m}.lora_B2.weight", (OUT, extra))]
    return found


def bottleneck_entries(dim: int) -> list[Entry]:
    m = "base_model.model.x.mlp.bottleneck"
    weights = [Entry("down", f"{m}.down.weight", (dim, INNER)), Entry("up", f"{m}.up.weight", (INNER, dim))]
    return [*weights, Entry("down", f"{m}.down.bias", (dim,)), Entry("up", f"{m}.up.bias", (INNER,))]


ENTRIES = {
    "lora": lambda settings: lora_entries(settings.get("r", 8), settings.get("extra", 0)),
    "bottleneck": lambda settings: bottleneck_entries(settings["dim"]),
    "prompt": lambda settings: [Entry("prompt", "prompt_embeddings", (settings["tokens"], INNER))],
    "prefix": lambda settings: [Entry("prefix", "prompt_embeddings", (settings["tokens"], 2 * INNER))],
    "ia3": lambda settings: [Entry("scale", f"{m}.ia3_l", (1, INNER)) for m in MODULES],
    "sparse-magnitude": lambda settings: [Entry(role, f"{MODULES[0]}.sparse_{role}", (6,)) for role in ("delta", "index")],
    "bitfit": lambda settings: [Entry("bias", f"{m}.bias", (OUT,)) for m in MODULES],
}


@pytest.fixture
def make():
    """``make(kind, seed, task, head, **settings)``: an adapter with random values."""

    def adapter(kind: str = "lora", seed: int = 0, task: str = "t", head: HeadSpec | None = None, **settings: Any) -> Adapter:
        entries = ENTRIES[kind](settings)
        if head is not None:
            entries.append(Entry("head", "base_model.model.score.weight", (len(head.labels), OUT)))
        layout = Layout.of(entries)
        spec = AdapterSpec(task, "b" * 64, "tiny", METHODS[kind](**settings), head or HeadSpec("lm"), layout)
        flat = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
        return Adapter(spec, Tensors(layout, flat))

    return adapter


@pytest.fixture(scope="session")
def change():
    """``change(adapter, module)``: B A + B2 A2 in float64."""

    def weight_change(adapter: Adapter, module: str = MODULES[0]) -> Any:
        named = {name: value.astype(np.float64) for name, value in adapter.tensors.named().items()}
        pairs = [("B", "A"), ("B2", "A2")] if f"{module}.lora_B2.weight" in named else [("B", "A")]
        return sum(named[f"{module}.lora_{b}.weight"] @ named[f"{module}.lora_{a}.weight"] for b, a in pairs)

    return weight_change


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder, words = tmp_path_factory.mktemp("llama"), ["<unk>", "<pad>", "</s>", "<s>", *(f"w{i}" for i in range(28))]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder
