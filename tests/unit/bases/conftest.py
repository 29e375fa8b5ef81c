"""Tiny random models on disk, of every architecture that the tests name, with a word tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = ["<unk>", "<pad>", "</s>", "<s>", *(f"w{i}" for i in range(60))]


def write_tokenizer(folder: Path, pad: str | None = "<pad>", eos: str | None = "</s>") -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    unk = "<unk>" if pad or eos else None
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unk, pad_token=pad, eos_token=eos, model_max_length=64).save_pretrained(
        folder
    )


def tiny(kind: str) -> object:
    """A transformers model of two layers, hidden size 64, random weights from a fixed seed."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        BertConfig,
        BertModel,
        DistilBertConfig,
        GPT2Config,
        LlamaConfig,
        ModernBertConfig,
        RobertaConfig,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    small = {**sizes, "max_position_embeddings": 80, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3}
    distil = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64, "pad_token_id": 1}
    makers: dict[str, Callable[[], object]] = {
        "bert": lambda: BertModel(BertConfig(**small)),
        "bert-mlm": lambda: AutoModelForMaskedLM.from_config(BertConfig(**small)),  # a checkpoint without pooler
        "roberta": lambda: AutoModelForMaskedLM.from_config(RobertaConfig(**small)),
        "modernbert": lambda: AutoModelForMaskedLM.from_config(ModernBertConfig(**small, cls_token_id=3, sep_token_id=2)),
        "distilbert": lambda: AutoModelForMaskedLM.from_config(DistilBertConfig(vocab_size=len(WORDS), **distil)),
        "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**small, num_key_value_heads=2)),
        "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(WORDS), n_embd=64, n_layer=2, n_head=4, n_positions=64)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=len(WORDS), d_model=64, num_layers=1, num_heads=4, d_ff=128, d_kv=16)
        ),  # begins with nothing
        "vit": lambda: ViTModel(
            ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32)
        ),
    }
    return makers[kind]()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by architecture; written once per session, never to be changed (copy it first)."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny(kind).save_pretrained(made[kind])  # type: ignore[attr-defined]
            write_tokenizer(made[kind])
        return made[kind]

    return folder
